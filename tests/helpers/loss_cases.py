"""Random configurations of an update, the batches they run on, and what the plain loop makes of
them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nexrl_worker.training.losses.aggregation import CORRECTIONS, MODES
from nexrl_worker.training.losses.formulas import KL_TYPES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from tests.helpers.engines import SMALL, MemoryRows
from tests.helpers.formulas import Loss
from tests.helpers.plain_loop import (
    Trained,
    outputs_at,
    policy_step,
    scored_columns,
    temperature_of,
    train,
    value_step,
)

VOCABULARY: int = SMALL["vocab_size"]  # type: ignore[assignment]
JUNK = 10_000
EPS = 0.5
OPTIM = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.01}
TOP_K = ("forward_kl", "reverse_kl")

LOSSES = {
    "ppo": Loss("ppo", low=0.1, high=0.3),
    "ppo-dual": Loss("ppo", dual=1.3),
    "grpo": Loss("grpo"),
    "gspo": Loss("gspo", low=3e-4, high=4e-4),
    "cispo": Loss("cispo", low=None, high=0.2),
    "cispo-low": Loss("cispo", low=0.3, high=0.2),
    "importance_sampling": Loss("importance_sampling"),
    "reinforce": Loss("reinforce"),
    "cross_entropy": Loss("cross_entropy"),
    "linear": Loss("linear"),
    "distillation": Loss("importance_sampling", teacher=0.7),
    "distillation-clipped": Loss("ppo", teacher=0.7, low=0.2, high=0.2),
    "distillation-forward": Loss("forward_kl", teacher=0.5),
    "distillation-reverse": Loss("reverse_kl", teacher=0.5),
    "distillation-old": Loss("importance_sampling", teacher=0.7, student="old_log_probs"),
    "distillation-sampler": Loss("importance_sampling", teacher=0.7, student="rollout_log_probs"),
    "ppo-dropping": Loss("ppo", drops=True),
    "grpo-kl": Loss("grpo", kl_times_ratio=True),
    "critic": Loss("critic"),
}

DRAWN = st.fixed_dictionaries(
    {
        "size": st.integers(3, 8),
        "response": st.sampled_from([6, 9, 13]),
        "padding": st.sampled_from(["left", "right", "both", "holes"]),
        "masks": st.sampled_from(["scoring", "loss", "attention"]),
        "wide": st.booleans(),
        "temperature": st.sampled_from([0.6, 0.9, 1.3, "of each row"]),
        "mode": st.sampled_from(MODES),
        "entropy": st.sampled_from([0.0, 0.05]),
        "kl_type": st.sampled_from([None, *KL_TYPES]),
        "own_reference": st.booleans(),
        "correction": st.sampled_from([None, None, *CORRECTIONS]),
        "no_decay": st.sampled_from([None, "norms and biases"]),
        "old": st.booleans(),
        "k": st.sampled_from([1, 5, VOCABULARY]),
        "clip": st.sampled_from([0.0, 0.5]),
        "mini": st.sampled_from([None, 3, 4]),
        "epochs": st.sampled_from([1, 2]),
        "shuffle": st.booleans(),
        "micro": st.sampled_from([None, 1, 2, 3]),
        "budget": st.sampled_from([None, 16, 40]),
        "packing": st.booleans(),
        "gradient_sync": st.sampled_from(["micro_batch", "mini_batch"]),
        "seed": st.integers(0, 1 << 20),
    }
)


@dataclass
class Case:
    """`loss` and `rows` for the plain loop, `names` being what the loss may read; `order` is what
    the ranks are told."""

    loss: Loss
    rows: MemoryRows
    names: list[str]
    order: dict[str, Any]


@cache
def drawn(count: int, first: int) -> list[dict[str, Any]]:
    """`count` draws by hypothesis, the same in every run, each unlike all others in more than a
    third of its keys."""
    found: list[dict[str, Any]] = []

    @seed(first)
    @settings(
        max_examples=500,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(DRAWN)
    def draw(case: dict[str, Any]) -> None:
        if len(found) < count and all(
            sum(case[key] != old[key] for key in case) > len(case) // 3 for old in found
        ):
            found.append(case)

    draw()
    assert len(found) == count
    return found


def load(path: str, critic: bool) -> nn.Module:
    """The plain model, in float64."""
    kind = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(path, dtype=torch.float64)
    return model.eval()


def make(
    folder: Path, name: str, variant: str, draw: dict[str, Any], path: str, dtype: str
) -> Case:
    """The case of `variant` and `draw`, its batch in a file for the ranks."""
    critic = variant == "critic"
    loss = _loss(LOSSES[variant], draw, critic)
    steps = -(-draw["size"] // (draw["mini"] or draw["size"])) * draw["epochs"]
    rows = _rows(draw, load(path, critic), critic)
    ratio = loss.name in ("ppo", "grpo", "gspo", "cispo", "importance_sampling")
    needs_old = ratio or loss.correction is not None
    names = [
        "advantages",
        "loss_weights",
        "teacher_log_probs",
        "teacher_topk_ids",
        "teacher_topk_log_probs",
    ]
    if critic:
        names = ["returns", *(["values"] if draw["old"] else [])]
    elif loss.teacher is not None and loss.name not in TOP_K:
        names.remove("loss_weights")
        if draw["wide"]:
            names.remove("advantages")
    else:
        names.remove("teacher_log_probs")
    sure = loss.drops or loss.student == "old_log_probs"
    if needs_old and (draw["old"] or steps > 1 or sure):
        names.append("old_log_probs")
    elif loss.teacher is not None and loss.name == "importance_sampling":
        loss = replace(loss, name="reinforce")
    names += ["rollout_log_probs"] if loss.correction or loss.student == "rollout_log_probs" else []
    names += ["ref_log_prob"] if loss.kl else []
    rows.tensors = {
        key: value for key, value in rows.tensors.items() if key in names or key in _INPUTS
    }
    sent = {
        key: value for key, value in rows.tensors.items() if key != "ref_log_prob" or not _own(draw)
    }
    save_file({key: value.contiguous() for key, value in sent.items()}, folder / f"{name}.batch")
    operation = "update_critic" if critic else "update_actor"
    params: dict[str, Any] = {}
    if loss.teacher is not None:
        operation = "update_actor_with_distillation"
        params["distillation_coeff"] = loss.teacher
        params |= {"distillation_loss": loss.name} if loss.name in TOP_K else {}
    order = {
        "path": path,
        "role": "critic" if critic else "actor",
        "operation": operation,
        "params": params,
        "batch": str(folder / f"{name}.batch"),
        "metadata": rows.metadata,
        "config": {**_config(loss, draw), "dtype": dtype},
        "calls": -(-3 // steps),
    }
    return Case(loss, rows, [key for key in names if key in rows.tensors], order)


_INPUTS = (
    "input_ids",
    "attention_mask",
    "responses",
    "scoring_attention_mask",
    "loss_mask",
    "temperature",
)


def _own(draw: dict[str, Any]) -> bool:
    """Whether the KL term is to the group's own frozen copy; |d| has a kink where that starts."""
    return bool(draw["own_reference"] and draw["kl_type"] != "abs")


def _loss(plain: Loss, draw: dict[str, Any], critic: bool) -> Loss:
    if critic:
        return replace(plain, mode=draw["mode"], scale=12.0)
    corrects = plain.name not in ("cross_entropy", "linear", *TOP_K) and draw["correction"]
    corrects = (
        "sequence_mask"
        if plain.drops and draw["wide"]
        else "token_mask"
        if plain.drops
        else corrects
    )
    kl_type = draw["kl_type"] or ("k3" if plain.kl_times_ratio else None)
    return replace(
        plain,
        mode=draw["mode"],
        scale=12.0,
        entropy=draw["entropy"],
        kl=0.1 if kl_type else 0.0,
        kl_type=kl_type or "k3",
        correction={"mode": corrects, "lower": 0.7, "upper": 1.4} if corrects else None,
    )


def _config(loss: Loss, draw: dict[str, Any]) -> dict[str, Any]:
    """As the configuration of a group says it."""
    teaches = loss.teacher is not None
    return {
        "policy_loss": "ppo" if teaches or loss.name == "critic" else loss.name,
        "loss_agg_mode": loss.mode,
        "loss_scale_factor": loss.scale,
        "clip_ratio_low": None if loss.name == "gspo" else loss.low,
        "clip_ratio_high": None if loss.name == "gspo" else loss.high,
        "clip_ratio_c": None if teaches else loss.dual,
        "use_distillation_clipping": teaches and loss.name == "ppo",
        "distillation_cliprange": loss.high,
        "entropy_coeff": loss.entropy,
        "use_kl_loss": loss.kl != 0.0,
        "kl_loss_coef": loss.kl,
        "kl_loss_type": loss.kl_type,
        "use_bias_correction_kl": loss.kl_times_ratio,
        "distillation_student": loss.student or "current",
        "rollout_correction": loss.correction and {**loss.correction, "drop_rejected": loss.drops},
        "cliprange_value": EPS,
        "grad_clip": draw["clip"],
        "optim": {**OPTIM, "no_decay": draw["no_decay"]},
        "ppo_mini_batch_size": draw["mini"],
        "ppo_epochs": draw["epochs"],
        "shuffle": draw["shuffle"],
        "seed": draw["seed"],
        "ppo_micro_batch_size_per_gpu": draw["micro"],
        "use_dynamic_bsz": draw["budget"] is not None,
        "ppo_max_token_len_per_gpu": draw["budget"] or 1 << 14,
        "packing": draw["packing"],
        "gradient_sync": draw["gradient_sync"],
    }


def _rows(draw: dict[str, Any], model: nn.Module, critic: bool) -> MemoryRows:
    """Every tensor that any loss reads; row 1 scores nothing, and what is not scored holds NaN or
    an impossible id."""
    random = torch.Generator().manual_seed(draw["seed"])
    size, response, width = draw["size"], draw["response"], 14
    attention = torch.stack([_attended(draw["padding"], width, random) for _ in range(size)])
    ids = torch.randint(0, VOCABULARY, (size, width), generator=random)
    ids[attention == 0] = JUNK
    tensors: dict[str, Tensor] = {"input_ids": ids, "attention_mask": attention}
    tensors["responses"] = ids[:, width - response :].clone()
    if draw["masks"] != "attention":
        mask = (torch.rand(size, width, generator=random) < 0.75).int() * attention
        mask[:, -6] = 1
        mask[1] = 0
        tensors["scoring_attention_mask" if draw["masks"] == "scoring" else "loss_mask"] = mask
    rows = MemoryRows(tensors, temperature=draw["temperature"])
    if draw["temperature"] == "of each row":
        rows.metadata = {"temperature": 5.0}
        tensors["temperature"] = 0.5 + torch.rand(size, generator=random, dtype=torch.float64)
        if draw["masks"] != "attention":
            tensors["temperature"][1] = float("nan")
    scored = torch.zeros(size, width, dtype=torch.bool)
    for row in range(size):
        scored[row, scored_columns(rows, row)] = True
    near = _scores(model, rows, critic)

    def noise(spread: float, around: Tensor | float = 0.0) -> Tensor:
        return around + spread * torch.randn(size, width, generator=random, dtype=torch.float64)

    old = noise(0.25, near)
    logs = torch.log_softmax(
        2 * torch.randn(size, width, VOCABULARY, generator=random, dtype=torch.float64), dim=-1
    )
    best = logs.topk(draw["k"], dim=-1)
    values = {
        "advantages": noise(1.0),
        "old_log_probs": old,
        "rollout_log_probs": noise(0.15, old),
        "ref_log_prob": near if _own(draw) else noise(0.3, near),
        "loss_weights": noise(1.0),
        "teacher_log_probs": noise(0.6, near),
        "returns": noise(0.8, near),
        "values": noise(0.6, near),
        "teacher_topk_log_probs": best.values,
    }
    for name, value in values.items():
        value[~scored] = float("nan")
        keeps = draw["wide"] and value.ndim == 2
        rows.tensors[name] = value if keeps else value[:, width - response :].clone()
    best.indices[~scored] = JUNK
    rows.tensors["teacher_topk_ids"] = best.indices[:, width - response :].clone()
    return rows


def _attended(padding: str, width: int, random: torch.Generator) -> Tensor:
    """A row's attention mask; the sixth column from the end and two before it are always
    attended."""
    mask = torch.ones(width, dtype=torch.int32)
    left, right = (int(n) for n in torch.randint(0, 6, (2,), generator=random))
    if padding != "right":
        mask[:left] = 0
    if padding != "left":
        mask[width - right :] = 0
    if padding == "holes":
        mask *= (torch.rand(width, generator=random) < 0.8).int()
    mask[-8:-5] = 1
    return mask


@torch.no_grad()
def _scores(model: nn.Module, rows: MemoryRows, critic: bool) -> Tensor:
    """Log-probabilities (values of a critic) [B,S] under the weights that training starts from."""
    found = torch.zeros(rows.size, rows.tensors["input_ids"].shape[1], dtype=torch.float64)
    for row in range(rows.size):
        columns = scored_columns(rows, row)
        answers = outputs_at(model, rows, row, columns)
        if critic:
            found[row, columns] = answers[:, 0]
            continue
        logs = torch.log_softmax(answers / temperature_of(rows, row), dim=-1)
        found[row, columns] = logs[range(len(columns)), rows.tensors["input_ids"][row][columns]]
    return found


def plain(case: Case, orders: list[list[int]]) -> Trained:
    """The plain loop over the same rows per optimizer step."""
    critic = case.order["role"] == "critic"
    model = load(case.order["path"], critic)
    step = (
        value_step(model, case.rows, case.loss, EPS)
        if critic
        else policy_step(model, case.rows, case.loss, case.names)
    )
    clip = case.order["config"]["grad_clip"] or float("inf")
    return train(
        model, case.rows, case.loss, step, orders, {**case.order["config"]["optim"], "clip": clip}
    )
