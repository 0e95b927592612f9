"""Shared by the tests of the mathematics: tiny models, configurations, batches, and a plain
reference loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import torch
from nexrl_worker.training import Engine, Plan
from nexrl_worker.training.batch.layout import RowsInMemory
from nexrl_worker.training.prepare import Prepared
from tensor_codec import TensorInfo, encode, parse_header
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SMALL = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip


def save_model(folder: Path, family: str = "qwen2", **changes: Any) -> str:
    """A random model folder: Qwen2 with tied head, biases and grouped heads, or Llama with a head
    of its own."""
    torch.manual_seed(3)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "tie_word_embeddings": True, **changes}))
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(value, std=0.2)
    else:
        model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": False, **changes}))
    model.save_pretrained(folder)
    return str(folder)


def config(path: str, **changes: Any) -> Space:
    """The actor's defaults as attributes; `changes` replace top-level keys (`optim` keys one by
    one).

    Given at the top too: `dtype`, `recompute`, `packing`, `compiled`, `lm_head_dtype`,
    `export_dtype`, `gradient_sync`.
    """
    optim = dict(
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, lr_warmup_steps=0,
        lr_scheduler="constant",
        total_training_steps=None, min_lr_ratio=0.0, no_decay=None,
    )  # fmt: skip
    optim.update(changes.pop("optim", {}))
    dtype = changes.pop("dtype", "float64")
    recompute = changes.pop("recompute", False)
    keys: dict[str, Any] = dict(
        model=Space(
            path=path, enable_gradient_checkpointing=recompute,
            use_remove_padding=changes.pop("packing", False),
            use_torch_compile=changes.pop("compiled", False),
            lm_head_dtype=changes.pop("lm_head_dtype", None),
            export_dtype=changes.pop("export_dtype", None),
        ), ref=Space(model=Space(path=None)),
        policy_loss="ppo", loss_agg_mode="token-mean", clip_ratio=0.2, clip_ratio_low=None,
        clip_ratio_high=None,
        clip_ratio_c=None, loss_scale_factor=None, rollout_correction=None,
        distillation_loss="policy_gradient",
        use_distillation_clipping=False, distillation_cliprange=0.2,
        distillation_cliprange_low=None,
        distillation_cliprange_high=None, cliprange_value=0.5, entropy_coeff=0.0,
        use_kl_loss=False, kl_loss_coef=0.001, kl_loss_type="low_var_kl",
        use_bias_correction_kl=False,
        distillation_student="current",
        ppo_mini_batch_size=None, ppo_epochs=1, rollout=Space(n=1, temperature=1.0), shuffle=False,
        seed=0,
        ppo_micro_batch_size_per_gpu=None, use_dynamic_bsz=False, ppo_max_token_len_per_gpu=16384,
        optim=Space(**optim), grad_clip=1.0,
        fsdp_config=Space(
            model_dtype=dtype, gradient_sync=changes.pop("gradient_sync", "micro_batch"),
            mixed_precision=Space(param_dtype=None, reduce_dtype=None)),
    )  # fmt: skip
    return Space(**{**keys, **changes})


class MemoryRows(RowsInMemory):
    """A batch in memory whose tensors a test may change."""

    def __init__(self, tensors: dict[str, Tensor], **metadata: Any) -> None:
        super().__init__(tensors, metadata)

    @property
    def header(self) -> dict[str, TensorInfo]:
        frame = encode(self.tensors)
        return parse_header(frame.header, frame.nbytes).tensors

    @header.setter
    def header(self, value: object) -> None:
        """What it was made with says nothing of what it has become."""

    def pick(self, rows: list[int]) -> MemoryRows:
        return MemoryRows(
            {name: value[rows] for name, value in self.tensors.items()}, **self.metadata
        )

    def lengths(self) -> list[int]:
        return [int(n) for n in self.tensors["attention_mask"].sum(dim=1)]


def batch(
    size: int = 7, width: int = 14, response: int = 8, temperature: float = 0.7, seed: int = 0
) -> MemoryRows:
    """Left- and right-padded rows, ragged scoring masks with holes, one all-masked row, pad ids
    beyond the vocabulary."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (size, width), generator=random)
    attention = torch.ones(size, width, dtype=torch.int32)
    scoring = (torch.rand(size, width, generator=random) < 0.8).int()
    for row in range(size):
        left = int(torch.randint(0, width - response, (1,), generator=random))
        right = int(torch.randint(0, response - 1, (1,), generator=random))
        attention[row, :left] = 0
        attention[row, width - right :] = 0
    if size > 3:
        scoring[3] = 0
    scoring *= attention
    ids[attention == 0] = 10_000
    old = -2.0 - 2 * torch.rand(size, response, generator=random, dtype=torch.float64)
    return MemoryRows(
        {
            "input_ids": ids,
            "attention_mask": attention,
            "responses": ids[:, width - response :],
            "scoring_attention_mask": scoring,
            "advantages": torch.randn(size, response, generator=random, dtype=torch.float64),
            "old_log_probs": old,
            "ref_log_prob": old
            + 0.3 * torch.randn(size, response, generator=random, dtype=torch.float64),
        },
        temperature=temperature,
    )


def planned(
    engine: Engine, operation: str, rows: MemoryRows, **params: Any
) -> tuple[Prepared, Plan]:
    """An operation prepared and its rows cut, for `Engine.check` and what runs it."""
    prepared = engine.prepare(operation, rows, params)
    return prepared, engine.plan(prepared, rows.lengths() if rows.has("attention_mask") else None)


# -- a plain single-process loop, from the formulas alone
# ------------------------------------------------------------


def plain_scores(model: torch.nn.Module, rows: MemoryRows) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) [B,R] from the model's logits, one row at a time."""
    ids, attention = rows.tensors["input_ids"], rows.tensors["attention_mask"]
    size, width = ids.shape
    response = rows.tensors["responses"].shape[1]
    lines_p, lines_e = [], []
    for row in range(size):
        real = attention[row].bool()
        first = int(real.nonzero()[0])
        last = int(real.nonzero()[-1])
        alone = ids[row, first : last + 1]
        logits = (
            model(input_ids=alone[None], use_cache=False).logits[0].double()
            / rows.metadata["temperature"]
        )
        logs = torch.log_softmax(logits, dim=-1)
        values_p, values_e = [], []
        for k in range(response):
            at = width - response + k - first
            if 1 <= at < len(alone):
                values_p.append(logs[at - 1, alone[at]])
                values_e.append(-(logs[at - 1].exp() * logs[at - 1]).sum())
            else:
                values_p.append(torch.zeros((), dtype=torch.float64))
                values_e.append(torch.zeros((), dtype=torch.float64))
        lines_p.append(torch.stack(values_p))
        lines_e.append(torch.stack(values_e))
    return torch.stack(lines_p), torch.stack(lines_e)


def plain_loss(model: torch.nn.Module, rows: MemoryRows, actor: Space) -> Tensor | None:
    """PPO with entropy and k3 over the scored tokens of these rows; None when there are none."""
    log_probs, entropies = plain_scores(model, rows)
    tensors = rows.tensors
    mask = tensors["scoring_attention_mask"][:, -log_probs.shape[1] :].bool()
    if not mask.any():
        return None
    lines = []
    for row in range(rows.size):
        picked = mask[row]
        ratio = torch.exp(log_probs[row][picked] - tensors["old_log_probs"][row][picked])
        gain = tensors["advantages"][row][picked]
        policy = torch.max(
            -gain * ratio, -gain * torch.clamp(ratio, 1 - actor.clip_ratio, 1 + actor.clip_ratio)
        )
        apart = tensors["ref_log_prob"][row][picked] - log_probs[row][picked]
        term = policy - actor.entropy_coeff * entropies[row][picked]
        lines.append(term + actor.kl_loss_coef * (torch.exp(apart) - apart - 1))
    used = [line for line in lines if line.numel()]
    if actor.loss_agg_mode == "token-mean":
        return torch.cat(lines).sum() / mask.sum()
    if actor.loss_agg_mode == "seq-mean-token-sum":
        return torch.stack([line.sum() for line in used]).sum() / len(used)
    return torch.stack([line.mean() for line in used]).sum() / len(used)


def plain_training(path: str, rows: MemoryRows, actor: Space, rates: list[float]) -> dict[str, Any]:
    """As many AdamW steps as `rates`, mini-batches in order, over and over; parameters and gradient
    norms."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    optim = actor.optim
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=1.0,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    step = actor.ppo_mini_batch_size or rows.size
    parts = [list(range(at, min(at + step, rows.size))) for at in range(0, rows.size, step)]
    norms = []
    for number, rate in enumerate(rates):
        loss = plain_loss(model, rows.pick(parts[number % len(parts)]), actor)
        assert loss is not None
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), actor.grad_clip)))
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    return {
        "start": start,
        "end": {name: value.detach() for name, value in model.named_parameters()},
        "norms": norms,
    }


def relative_gap(
    found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """L2 distance of two sets of parameters over the L2 length of the wanted update."""
    gap = sum(float((found[name].double() - wanted[name]).square().sum()) for name in wanted)
    length = sum(float((wanted[name] - start[name]).square().sum()) for name in wanted)
    return float((gap / length) ** 0.5)
