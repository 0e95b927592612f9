"""Rotations that go by the length of a row: a row's numbers are those of transformers on that row
alone, in a new model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_worker.training.errors import InvalidValue
from nexrl_worker.training.model.build import Recipe
from nexrl_worker.training.model.policy import PolicyModel
from nexrl_worker.training.model.probe import Prober
from nexrl_worker.training.model.roles import role_of
from nexrl_worker.training.model.rotary import position_limit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    XLNetConfig,
)

from tests.helpers.engines import MemoryRows
from tests.helpers.single_rank import CPU, build, compute, update

pytestmark = pytest.mark.usefixtures("one_rank")

COMMON: dict[str, Any] = dict(
    vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8, initializer_range=0.3, pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [2.0, 5.0, 9.0],
    "rope_theta": 10000.0,
}  # fmt: skip
LONG = {**COMMON, "max_position_embeddings": 32, "original_max_position_embeddings": 8}
FAMILIES: dict[str, PretrainedConfig] = {
    "dynamic": LlamaConfig(**COMMON, rope_parameters=DYNAMIC),
    "longrope": Phi3Config(**LONG, rope_parameters=LONGROPE),
    "by layer type": Gemma3TextConfig(
        **{**COMMON, "head_dim": 8}, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, (
            "full_attention"
): DYNAMIC},
    ),
    "with a scale by length": PhimoeConfig(
        **LONG, num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.5},
    ),
}  # fmt: skip
LENGTHS = (6, 19, 8, 12, 3)


def ragged() -> MemoryRows:
    """Rows within the original length and beyond it, each padded left and right."""
    ids = torch.randint(3, 61, (len(LENGTHS), 22), generator=torch.Generator().manual_seed(2))
    columns = torch.arange(22)
    starts = torch.tensor([0, 2, 5, 1, 9])[:, None]
    attention = ((columns >= starts) & (columns < starts + torch.tensor(LENGTHS)[:, None])).long()
    return MemoryRows(
        {"input_ids": ids, "attention_mask": attention, "advantages": torch.ones(len(LENGTHS))}
    )


def saved(folder: Path, made: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> str:
    torch.manual_seed(0)
    auto.from_config(made).save_pretrained(folder)
    return str(folder)


def own(path: str, dtype: torch.dtype, rows: MemoryRows) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B,S-1] and the norm of their sum's gradient over N, each row by a model of
    its own."""
    scores = torch.zeros(rows.size, 21, dtype=dtype)
    total: dict[str, Tensor] = {}
    for row in range(rows.size):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        places = rows.tensors["attention_mask"][row].nonzero()[:, 0]
        alone = rows.tensors["input_ids"][row, places]
        logs = torch.log_softmax(model(alone[None], use_cache=False).logits[0], dim=-1)
        found = logs[:-1].gather(1, alone[1:, None])[:, 0]
        scores[row, places[1:] - 1] = found.detach()
        found.sum().backward()
        for name, param in model.named_parameters():
            if param.grad is not None:
                total[name] = total.get(name, 0) + param.grad
    count = sum(length - 1 for length in LENGTHS)
    return scores, torch.stack([grad.norm() for grad in total.values()]).norm() / count


CASES = [(family, dtype) for family in sorted(FAMILIES) for dtype in (torch.float64, torch.float32)]
CASES.remove(
    ("with a scale by length", torch.float64)
)  # torch multiplies experts in float32 at the most


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_a_row_is_computed_as_it_is_alone(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever stands beside it or came before: scores and the gradient's norm for every cut,
    packed and padded."""
    path, rows = saved(tmp_path, FAMILIES[family]), ragged()
    wanted, norm = own(path, dtype, rows)
    exact = dtype == torch.float64
    for packing in (False, True):
        for size in (1, 2, None):
            engine = build(
                path, dtype=str(dtype).removeprefix("torch."), packing=packing,
                policy_loss="reinforce",
                ppo_micro_batch_size_per_gpu=size, recompute=size == 2,
            )  # fmt: skip
            for _ in range(2):  # a rotation must not remember the longest row that it met
                found = compute(engine, "compute_log_prob", rows)["old_log_probs"].to(dtype)
                assert torch.allclose(found, wanted, atol=1e-6 if exact else 1e-4), (packing, size)
            got = update(engine, rows)[0].metrics["actor/grad_norm"]
            assert got == pytest.approx(float(norm), rel=1e-5 if exact else 1e-3), (packing, size)
            info = engine.info()
            assert (info["max_position_embeddings"], info["packing"]) == (32, packing), info[
                "packing_reason"
            ]


@pytest.mark.parametrize(("family", "packing"), [("dynamic", False), ("longrope", True)])
def test_a_reference_and_a_critic_give_each_row_its_own_number(
    family: str, packing: bool, tmp_path: Path
) -> None:
    """However the rows are cut; a reference may be stretched where the group's own model is not."""
    path, rows = saved(tmp_path / "it", FAMILIES[family]), ragged()
    made = FAMILIES[family].__class__
    group = saved(tmp_path / "group", made(**{**COMMON, "max_position_embeddings": 64}))
    headed = made(**{**FAMILIES[family].to_dict(), "num_labels": 1})
    valued = saved(tmp_path / "valued", headed, AutoModelForTokenClassification)
    wanted = own(path, torch.float64, rows)[0]
    for size in (1, None):
        cut = {"packing": packing, "ppo_micro_batch_size_per_gpu": size}
        engine = build(group, ref=Space(model=Space(path=path)), **cut)
        assert torch.allclose(
            compute(engine, "compute_ref_log_prob", rows)["ref_log_prob"].double(),
            wanted,
            atol=1e-6,
        )
        assert engine.info()["packing"] is packing

        found = compute(build(valued, "critic", **cut), "compute_values", rows)["values"].double()
        for row in range(rows.size):
            model = AutoModelForTokenClassification.from_pretrained(
                valued, dtype=torch.float64
            ).eval()
            places = rows.tensors["attention_mask"][row].nonzero()[:, 0]
            alone = rows.tensors["input_ids"][row, places]
            values = model(alone[None], use_cache=False).logits[0, :-1, 0].detach()
            assert torch.allclose(found[row, places[1:] - 1], values, atol=1e-5), (row, size)


@pytest.mark.parametrize("head", ["linear", "own"])
def test_a_reward_is_that_of_the_row_alone(head: str, tmp_path: Path) -> None:
    """By the linear head and by the family's own forward, which counts padding as positions."""
    made = LlamaConfig(**COMMON, rope_parameters=DYNAMIC, num_labels=1)
    path, rows = saved(tmp_path, made, AutoModelForSequenceClassification), ragged()
    engine = build(path, "reward")
    if head == "own":
        engine._model.fallback = "asked for by this test"  # type: ignore[attr-defined]
    found = compute(engine, "compute_rewards", rows)
    rewards = next(iter(found.values())).detach()
    for row in range(rows.size):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
        alone = rows.tensors["input_ids"][row][rows.tensors["attention_mask"][row].bool()]
        wanted = model(alone[None], use_cache=False).logits.detach().sum()
        assert float(rewards[row].sum()) == pytest.approx(float(wanted), abs=1e-6), row


def test_the_probe_sees_windows_longer_than_its_rows() -> None:
    """A window that only the packed or only the padded way has is found, though no row of the probe
    is as long."""
    small = {
        **COMMON,
        "max_position_embeddings": 64,
        "sliding_window": 32,
        "num_experts_per_tok": 2,
    }
    for made, packs in (
        (OlmoeConfig(**small, num_experts=4), False),  # tells its attention, but not the mask
        (MixtralConfig(**small, num_local_experts=4), True),
    ):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        outcome = Prober(PolicyModel(model), Recipe(role_of("actor"), CPU), True).compare()
        assert outcome.packs is packs, outcome
        assert packs or "differ" in (outcome.packing_reason or "")
        assert model.config.sliding_window == 32


def rotary(most: int, **rope: Any) -> PretrainedConfig:
    known = {"rope_theta": 10000.0, **rope} if rope else None
    return LlamaConfig(**{**COMMON, "max_position_embeddings": most}, rope_parameters=known)


@pytest.mark.parametrize(
    ("made", "most"),
    [
        (rotary(32), None),
        (rotary(32, rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (rotary(128, rope_type="yarn", factor=4.0, original_max_position_embeddings=32), 128),
        (rotary(32, rope_type="dynamic", factor=2.0), 64),
        (rotary(32, rope_type="linear", factor=2.5), 80),
        (
            rotary(
                128, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8,
            ),
            128,
        ),
        (FAMILIES["longrope"], 32),
        (FAMILIES["by layer type"], 32),
        (GPT2Config(vocab_size=61, n_embd=24, n_layer=1, n_head=4, n_positions=32), 32),
        (BloomConfig(vocab_size=61, hidden_size=24, n_layer=1, n_head=4), None),
        (XLNetConfig(vocab_size=61, d_model=24, n_layer=1, n_head=4, d_inner=28), None),
    ],
    ids=lambda value: str(getattr(value, "model_type", value)),
)  # fmt: skip
def test_positions_end_where_the_model_does(made: PretrainedConfig, most: int | None) -> None:
    """Stretched rotations reach their original length times the factor; tables end, plain rotations
    and ALiBi do not."""
    with torch.device("meta"):
        assert position_limit(AutoModelForCausalLM.from_config(made)) == most


def test_plain_rotations_are_taken_beyond_the_maximum_that_is_shown(tmp_path: Path) -> None:
    """They have no table to run over: the numbers are transformers' own."""
    path, rows = saved(tmp_path, rotary(8)), ragged()
    engine = build(path)
    assert engine.info()["max_position_embeddings"] == 8
    found = compute(engine, "compute_log_prob", rows)["old_log_probs"].double()
    assert torch.allclose(found, own(path, torch.float64, rows)[0], atol=1e-6)


def test_rows_beyond_the_original_length_are_taken_up_to_the_factor(tmp_path: Path) -> None:
    """YaRN as model cards set it up: right beyond `max_position_embeddings`, refused beyond the
    factor."""
    yarn = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=8)
    path, rows = saved(tmp_path, rotary(8, **yarn)), ragged()
    rows.tensors["attention_mask"][:, 16:] = 0
    engine = build(path)
    found = compute(engine, "compute_log_prob", rows)["old_log_probs"].double()
    assert torch.allclose(found, own(path, torch.float64, rows)[0], atol=1e-6)
    rows.tensors["attention_mask"][1] = 1
    with pytest.raises(InvalidValue, match="at most 16"):
        compute(engine, "compute_log_prob", rows)
