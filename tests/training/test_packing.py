"""Packing: one stream of attended tokens gives what every row alone gives, whatever its padding,
masks and positions."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_worker.training import Engine
from nexrl_worker.training.batch.layout import Layout
from nexrl_worker.training.batch.micro_batch import BatchReader, MicroBatch
from nexrl_worker.training.batch.packing import Segments, attend, use_segments
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.build import Precision, Recipe, build_model
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.probe import Probe, Prober
from nexrl_worker.training.model.roles import role_of
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GotOcr2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.helpers.engines import MemoryRows, batch, config, save_model
from tests.helpers.single_rank import build, compute

CPU = torch.device("cpu")
TEMPERATURE = 0.7
COMMON = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=4),
    "gemma2": Gemma2Config(**COMMON, sliding_window=4, attn_logit_softcapping=2.0),
    "gpt2": GPT2Config(
        vocab_size=61,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "cohere": CohereConfig(**COMMON),
}


def hard_rows() -> MemoryRows:
    """Left and right padding, holes, two rows without any token, and positions that never restart
    between rows."""
    rows = batch()
    attention = rows.tensors["attention_mask"]
    attention[4, 3:6] = 0
    attention[4, 9] = 0
    attention[[2, 5]] = 0
    rows.tensors["scoring_attention_mask"] *= attention
    positions = (attention.cumsum(dim=-1) - 1).clamp(min=0)
    positions[4] += 3  # row 4 begins where nobody would look for a new row
    positions[6] = positions[6] * 2
    rows.tensors["position_ids"] = positions
    return rows


def reader(rows: MemoryRows, packed: bool) -> BatchReader:
    return BatchReader(
        rows, Layout.of(rows), (), CPU, torch.float64, packed, temperature=TEMPERATURE
    )


def mixture(rows: MemoryRows, row: int) -> Tensor:
    """A weight for every label, so that a label in the wrong place shows."""
    return torch.linspace(-1, 2, 8, dtype=torch.float64) * (row + 1)


def alone(model: Any, rows: MemoryRows, width: int = 8) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) [B,R] of each row's attended tokens by the model itself,
    without padding."""
    scores = torch.zeros(2, rows.size, width, dtype=torch.float64)
    lines = []
    for row in range(rows.size):
        kept = rows.tensors["attention_mask"][row].bool()
        if not kept.any():
            continue
        ids, positions = (
            rows.tensors["input_ids"][row][kept],
            rows.tensors["position_ids"][row][kept],
        )
        # A mask, though of ones: without it transformers takes a step in the positions for another
        # row's beginning.
        inputs = {
            "input_ids": ids[None],
            "position_ids": positions[None].long(),
            "attention_mask": torch.ones_like(ids[None]),
        }
        logits = model(**inputs, use_cache=False).logits[0]
        logs = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
        places = kept.nonzero()[:, 0].tolist()
        for at in range(1, len(places)):
            k = places[at] - (len(kept) - width)
            if k >= 0:
                lines.append(
                    (row, k, logs[at - 1, ids[at]], -(logs[at - 1].exp() * logs[at - 1]).sum())
                )
    for row, k, log_prob, entropy in lines:
        scores = scores.index_put(
            (torch.tensor([0, 1]), torch.tensor(row), torch.tensor(k)),
            torch.stack((log_prob, entropy)),
        )
    return scores[0], scores[1]


def loss_of(log_probs: Tensor, entropies: Tensor, rows: MemoryRows, indices: list[int]) -> Tensor:
    mask = (
        rows.tensors["scoring_attention_mask"][indices][:, -8:]
        * rows.tensors["attention_mask"][indices][:, -8:]
    )
    weights = torch.stack([mixture(rows, row) for row in indices]) * mask
    return (weights * log_probs + 0.3 * weights.square() * entropies).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: param.grad.clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cut", [[[0, 1, 2, 3, 4, 5, 6]], [[6, 2], [5], [4, 0, 1], [], [3]]])
def test_every_row_as_if_alone(tmp_path: Path, packed: bool, cut: list[list[int]]) -> None:
    """Log-probabilities, entropies and gradients in float64 equal those of every row alone to 1e-9,
    however cut."""
    rows = hard_rows()
    model: Any = AutoModelForCausalLM.from_pretrained(save_model(tmp_path), dtype=torch.float64)
    wanted = alone(model, rows)
    loss_of(*wanted, rows, list(range(7))).backward()
    expected = gradients(model)
    model.zero_grad()
    scorer = PolicyModel(model)
    for indices in cut:
        micro = reader(rows, packed).read(indices)
        log_probs, entropies = scorer.score(micro, entropy=True, all_labels=True)
        loss = loss_of(log_probs, entropies, rows, indices) if indices else log_probs.sum() * 0.0
        loss.backward()
        if indices:
            for found, right in zip((log_probs, entropies), wanted, strict=True):
                assert (found - right[indices]).abs().max() <= 1e-9 * right.abs().max()
    for name, grad in gradients(model).items():
        assert (grad - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


def test_a_stream_holds_attended_tokens_only() -> None:
    """No padding is computed; a micro-batch without any token and the dummy still hold something to
    run on."""
    rows = hard_rows()
    micro = reader(rows, True).read(list(range(7)))
    lengths = [int(count) for count in rows.tensors["attention_mask"].sum(dim=1) if count]
    assert micro.segments is not None and list(micro.segments.lengths) == lengths
    assert micro.padded == micro.attended == sum(lengths) and micro.attention_mask is None
    empty, dummy = (reader(rows, True).read(indices) for indices in ([2, 5], []))
    for nothing in (empty, dummy):
        assert nothing.attended == 0 and nothing.input_ids.numel() > 0 and not nothing.mask.any()
        assert nothing.last.max() == nothing.input_ids.numel() - 1 or nothing is empty


@pytest.mark.parametrize("packed", [True, False])
def test_last_tokens(tmp_path: Path, packed: bool) -> None:
    """`last` is where every row's last attended token is computed, as a reward head needs it."""
    rows = hard_rows()
    micro = reader(rows, packed).read([0, 1, 4, 6])
    for number, row in enumerate([0, 1, 4, 6]):
        ids = rows.tensors["input_ids"][row][rows.tensors["attention_mask"][row].bool()]
        assert micro.input_ids.flatten()[micro.last[number]] == ids[-1]


def test_a_first_token_is_no_label() -> None:
    """Left- and right-padded rows score the same labels: nothing predicts a row's first token, so
    it never counts."""
    ids = torch.arange(1, 7)
    left = torch.cat([torch.zeros(3, dtype=torch.int64), ids])[None]
    right = torch.cat([ids, torch.zeros(3, dtype=torch.int64)])[None]
    for packed in (True, False):
        micros = [
            reader(MemoryRows({"input_ids": one, "attention_mask": (one > 0).long()}), packed).read(
                [0]
            )
            for one in (left, right)
        ]
        assert [micro.labels.tolist() for micro in micros] == [[2, 3, 4, 5, 6]] * 2
        assert [int(micro.mask.sum()) for micro in micros] == [5, 5]
        assert torch.equal(micros[0].input_ids, micros[1].input_ids)


# -- families
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_pack_soundly(family: str) -> None:
    """Every family passes the probe and scores packed rows as its own code scores each alone
    (window and cap on)."""
    rows = hard_rows()
    torch.manual_seed(0)
    made = copy.deepcopy(FAMILIES[family])
    model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    wanted = alone(model, rows)[0]
    scorer = PolicyModel(model)
    outcome = probed(scorer)
    assert outcome.packs and outcome.packing_reason is None, outcome
    assert (outcome.reason is None) == (family not in ("gemma2", "cohere"))
    scorer.fallback = outcome.reason
    for packed in (True, False, True):
        micro = reader(rows, packed).read(list(range(7)))
        found = scorer.score(micro, entropy=False, all_labels=True)[0].double()
        assert torch.allclose(found, wanted, atol=2e-5), packed


def probed(scorer: PolicyModel, packing: bool = True, dtype: torch.dtype = torch.float32) -> Probe:
    recipe = Recipe(role_of("actor"), CPU, Precision(dtype, dtype, dtype))
    return Prober(scorer, recipe, packing).compare()


def llama(**changes: Any) -> PolicyModel:
    torch.manual_seed(0)
    return PolicyModel(
        AutoModelForCausalLM.from_config(LlamaConfig(**{**COMMON, **changes})).eval()
    )


def test_families_that_cannot_pack_say_why() -> None:
    """Fixed attention code, attention sinks, a window that attention is not told, rows that see
    each other: refused."""
    bloom = BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4)
    sinks = GptOssConfig(
        **{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None}
    )
    for made, words in ((bloom, "exchanged"), (sinks, "s_aux")):
        outcome = probed(
            PolicyModel(AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval())
        )
        assert not outcome.packs and words in (outcome.packing_reason or ""), outcome
    windowed = llama()
    windowed.hf.config.sliding_window = 4
    assert "2 layers have a sliding window and 0" in (probed(windowed).packing_reason or "")
    outcome = probed(llama(), packing=False)
    assert not outcome.packs and outcome.packing_reason is None


def test_a_language_model_is_packed_though_the_part_that_reads_images_keeps_its_attention() -> None:
    """Where its own cannot be exchanged either, everything is put back: padded rows are computed as
    before."""
    eyes = dict(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
        mlp_dim=16, global_attn_indexes=[0],
    )  # fmt: skip
    made = GotOcr2Config(
        text_config={**COMMON, "model_type": "qwen2"}, vision_config=eyes, image_token_index=60
    )
    torch.manual_seed(0)
    scorer, rows = PolicyModel(AutoModelForMultimodalLM.from_config(made).eval()), hard_rows()
    wanted = alone(scorer.hf, rows)[0]
    outcome = probed(scorer)
    assert (outcome.reason, outcome.packing_reason, outcome.packs) == (None, None, True)
    for packed in (True, False):
        found = scorer.score(
            reader(rows, packed).read(list(range(7))), entropy=False, all_labels=True
        )[0].double()
        assert torch.allclose(found, wanted, atol=2e-5), packed

    text = scorer.hf.config.get_text_config()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InvalidValue, match="exchanged"):
        patch.setattr(
            "nexrl_worker.training.transformers_parts.attention_of", lambda hf: scorer.own_attention
        )
        use_segments(scorer.hf)
    assert text._attn_implementation == scorer.own_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_each_other_are_found_out(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The probe tells a stream attended to as one row from packed rows, through bfloat16's rounding
    too."""
    scorer = llama().to(dtype)
    assert probed(scorer, dtype=dtype).packs

    def as_one(self: Segments, _: object = None) -> tuple[int, ...]:
        return (20,)

    monkeypatch.setattr(
        Segments, "lengths", property(as_one, lambda self, value: None), raising=False
    )
    outcome = probed(scorer, dtype=dtype)
    assert (
        not outcome.packs
        and "differ" in (outcome.packing_reason or "")
        and outcome.packed_difference > 5.0
    )


def test_attention_refuses_what_it_cannot_do() -> None:
    """A mask, an attention that is not causal, and a call without segments raise instead of
    attending anyhow."""
    module = torch.nn.Module()
    states = torch.zeros(1, 2, 5, 4)
    segments = Segments((2, 3), CPU)
    for mask, more in (
        (None, {}),
        (torch.ones(1), {"segments": segments}),
        (None, {"segments": segments, "is_causal": False}),
        (None, {"segments": segments, "position_bias": states}),
    ):
        with pytest.raises(InvalidValue):
            attend(module, states, states, states, mask, **more)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_by_formula(
    window: int | None, softcap: float | None, scaling: float | None
) -> None:
    """softmax(cap(scale q k)) v over the same row, not later, less than `window` before; heads
    share keys in groups."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 9, 6, generator=random)
    key, value = (torch.randn(1, 2, 9, 6, generator=random) for _ in range(2))
    found = attend(
        torch.nn.Module(), query, key, value, None, scaling=scaling, sliding_window=window,
        softcap=softcap,
        segments=Segments((4, 5), CPU),
    )[0]  # fmt: skip
    row = [0] * 4 + [1] * 5
    for head in range(4):
        for at in range(9):
            seen = [
                j
                for j in range(9)
                if row[j] == row[at] and j <= at and (window is None or at - j < window)
            ]
            scores = (
                query[0, head, at]
                @ key[0, head // 2, seen].T
                * (6**-0.5 if scaling is None else scaling)
            )
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            wanted = torch.softmax(scores, dim=-1) @ value[0, head // 2, seen]
            assert torch.allclose(found[0, at, head], wanted, atol=1e-5)


# -- sharded
# --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", ["qwen2", "sinks"])
def test_the_probe_leaves_nothing_gathered(tmp_path: Path, family: str) -> None:
    """After a probe that passed or failed every parameter is a shard again, and the model scores as
    before."""
    sinks = GptOssConfig(
        **{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        FAMILIES[family] if family == "qwen2" else sinks
    ).save_pretrained(tmp_path)
    root = build_model(str(tmp_path), Recipe(role_of("actor"), CPU))
    assert isinstance(root, PolicyModel)
    micro: MicroBatch = reader(hard_rows(), False).read([0, 1, 6])
    before = root.score(micro, entropy=False, all_labels=True)[0]
    before.sum().backward()
    outcome = probed(root)
    assert outcome.packs is (family == "qwen2")
    assert all(isinstance(param, DTensor) for param in root.parameters())
    assert torch.equal(root.score(micro, entropy=False, all_labels=True)[0], before)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_packing_where_layers_compute_in_another_dtype(tmp_path: Path, family: str) -> None:
    """float32 weights and bfloat16 layers, the usual way on a GPU: packed, and as close to float64
    as padded rows are."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path)
    half = Space(param_dtype="bfloat16", reduce_dtype=None)
    rows = hard_rows()
    truth = compute(build(str(tmp_path), "teacher"), "compute_log_prob", rows)["old_log_probs"]
    gaps = []
    for packing in (True, False):
        settings = config(str(tmp_path), dtype="float32", packing=packing)
        settings.fsdp_config.mixed_precision = half
        engine = Engine.build(settings, "teacher", CPU)
        info = engine.info()
        assert (
            info["compute_dtype"] == "bfloat16"
            and info["packing"] is packing
            and info["packing_reason"] is None
        )
        gaps.append(
            float((compute(engine, "compute_log_prob", rows)["old_log_probs"] - truth).norm())
        )
    assert 0 < gaps[0] < 1.5 * gaps[1] < 0.05 * float(truth.norm())
