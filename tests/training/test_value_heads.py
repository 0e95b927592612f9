"""Heads of every family: rewards and values against transformers' own forward of each row alone,
and a plain loop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.training import Engine, InvalidValue
from nexrl_worker.training.batch.micro_batch import TinyRows
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from tests.helpers.engines import MemoryRows, batch, relative_gap
from tests.helpers.plain_loop import Loss, scored_columns, train, value_step
from tests.helpers.single_rank import build, compute, update

pytestmark = pytest.mark.usefixtures("one_rank")
SMALL: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=3, sep_token_id=4,
)  # fmt: skip
ALTERNATING = {
    "pos_att_type": ["p2c", "c2p"],
    "relative_attention": True,
    "position_biased_input": False,
}
# Whether a linear head on the last token is what the family does.
REWARDS: dict[str, tuple[dict[str, Any], bool]] = {
    "bert": ({}, False),
    "roberta": ({}, False),
    "deberta-v2": (ALTERNATING, False),
    "deberta": ({**ALTERNATING, "relative_attention": False}, False),
    "modernbert": ({"global_attn_every_n_layers": 2}, False),
    "albert": ({"embedding_size": 16}, False),
    "electra": ({"embedding_size": 16}, False),
    "distilbert": ({"dim": 32, "hidden_dim": 28, "n_heads": 4, "n_layers": 2}, False),
    "xlm-roberta": ({}, False),
    "llama": ({}, True),
    "qwen3": ({"head_dim": 8}, True),
    "gpt2": ({}, True),
    "gemma2": ({"head_dim": 8}, True),
    "opt": ({"word_embed_proj_dim": 32}, True),
}
# Families without a class for token classification, some whose hidden states are not as wide as the
# model, and some with.
CRITICS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "opt": {"word_embed_proj_dim": 16},
    "cohere": {},
    "olmo2": {},
    "granite": {},
    "glm4": {"head_dim": 8},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 64},
    "gpt2": {},
    "gpt_neox": {},
    "llama": {},
}


def saved(folder: Path, family: str, auto: Any, keys: dict[str, Any]) -> str:
    """A random model, whose biases are random too."""
    torch.manual_seed(1)
    model = auto.from_config(CONFIG_MAPPING[family](**{**SMALL, **keys}, num_labels=1))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def padded(padding: str, end: int | None = None) -> MemoryRows:
    """Rows of different lengths, padded on either side; some end in the id `end`."""
    rows = batch()
    attention = torch.ones_like(rows.tensors["attention_mask"])
    ids = torch.randint(5, 61, attention.shape, generator=torch.Generator().manual_seed(2))
    for row in range(rows.size):
        attention[row, slice(0, row % 5) if padding == "left" else slice(14 - row % 5, 14)] = 0
        if end is not None and row % 2:
            ids[row, attention[row].nonzero()[-1:]] = end
    ids[attention == 0] = 60
    return MemoryRows(
        {"input_ids": ids, "attention_mask": attention, "responses": ids[:, 6:]}, temperature=1.0
    )


@torch.no_grad()
def alone(model: nn.Module, rows: MemoryRows) -> Tensor:
    """[B]: the model's own answer to each row, without padding or a mask."""
    real = rows.tensors["attention_mask"].bool()
    ids = rows.tensors["input_ids"]
    return torch.stack(
        [model(input_ids=ids[row][real[row]][None]).logits[0, 0] for row in range(rows.size)]
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", REWARDS)
def test_rewards_are_the_models_own(tmp_path: Path, family: str, padding: str) -> None:
    """Whatever stands between backbone and head, and wherever a row's padding id stands;
    worker_info says which way."""
    keys, linear = REWARDS[family]
    path = saved(tmp_path, family, AutoModelForSequenceClassification, keys)
    engine = build(path, "reward", ppo_micro_batch_size_per_gpu=3)
    assert (engine.info()["chunked_log_probs_reason"] is None) is linear
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    for end in (None, 1):
        rows = padded(padding, end)
        wanted = alone(model, rows)
        assert wanted.std() > 1e-2
        assert torch.allclose(
            compute(engine, "compute_rewards", rows)["rewards"],
            wanted.float(),
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_packed_rewards(tmp_path: Path, family: str) -> None:
    """Packed where the head is linear, else padded with the reason; rows that end in the padding id
    are the same."""
    path = saved(tmp_path, family, AutoModelForSequenceClassification, REWARDS[family][0])
    engine = build(path, "reward", packing=True, ppo_micro_batch_size_per_gpu=3)
    assert engine.info()["packing"] is REWARDS[family][1]
    assert family == "llama" or "layer between" in engine.info()["packing_reason"]
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    rows = padded("left", 1)
    rows.tensors["attention_mask"][3] = 0
    found = compute(engine, "compute_rewards", rows)["rewards"]
    assert found[3] == 0.0
    for row in (0, 1, 2, 4, 5, 6):
        assert torch.allclose(found[row], alone(model, rows.pick([row]))[0].float(), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("param", ["float32", "bfloat16"])
def test_answers_near_zero_are_not_taken_for_wrong_ones(
    tmp_path: Path, family: str, param: str
) -> None:
    """Rounding goes by the head's terms, not by a sum in which they cancel: here on each of the
    probe's rows."""
    path = saved(
        tmp_path / "model", family, AutoModelForSequenceClassification, {**REWARDS[family][0]}
    )
    model = AutoModelForSequenceClassification.from_pretrained(path)
    head = model.score if family == "llama" else model.classifier
    lengths = (9, 4, 7)
    tiny = TinyRows(61, lengths, avoid=range(5), end=1)
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for row, length in enumerate(lengths):
            model.eval()(input_ids=tiny.tensor("input_ids", [row])[:, :length])
        pooled = torch.stack(
            [states[-2 if row == 1 and len(states) > 1 else -1] for row, states in enumerate(seen)]
        )
        head.weight -= head.weight @ torch.linalg.pinv(pooled) @ pooled
        assert (head.weight @ pooled.T).abs().max() < 1e-5
        if head.bias is not None:
            head.bias.zero_()
    model.save_pretrained(tmp_path / "near")
    precision = SimpleNamespace(param_dtype=param, reduce_dtype=None)
    fsdp = SimpleNamespace(
        model_dtype="float32", gradient_sync="micro_batch", mixed_precision=precision
    )
    engine = build(str(tmp_path / "near"), "reward", fsdp_config=fsdp)
    assert (engine.info()["chunked_log_probs_reason"] is None) is REWARDS[family][1]


@pytest.mark.parametrize("padding", [-1, None])
def test_a_reward_model_without_a_padding_id(tmp_path: Path, padding: int | None) -> None:
    """Every row is read at its last token, whatever that is."""
    path = saved(tmp_path, "llama", AutoModelForSequenceClassification, {"pad_token_id": padding})
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    rows = padded("left", 1)
    found = compute(build(path, "reward"), "compute_rewards", rows)["rewards"]
    assert torch.allclose(found, alone(model, rows).float(), atol=1e-5)


def test_a_reward_model_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    """Several outputs; a pooling that needs a token of its own in every row."""
    torch.manual_seed(0)
    many = AutoModelForSequenceClassification.from_config(
        CONFIG_MAPPING["bert"](**SMALL, num_labels=3)
    )
    many.save_pretrained(tmp_path / "many")
    with pytest.raises(InvalidValue, match="3 outputs"):
        build(str(tmp_path / "many"), "reward")
    keys = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 32,
        "encoder_ffn_dim": 28,
        "decoder_ffn_dim": 28,
    }
    path = saved(
        tmp_path / "bart",
        "bart",
        AutoModelForSequenceClassification,
        {**keys, "decoder_start_token_id": 2},
    )
    with pytest.raises(InvalidValue) as caught:
        build(path, "reward")
    assert "Bart" in str(caught.value) and "\n" not in str(caught.value)


def test_positions_that_the_model_counts_itself(tmp_path: Path) -> None:
    """Those of each row from 0 are taken, others refused by row; so is a row longer than what is
    left of the table."""
    engine = build(saved(tmp_path, "roberta", AutoModelForSequenceClassification, {}), "reward")
    rows = padded("left")
    before = compute(engine, "compute_rewards", rows)["rewards"]
    rows.tensors["position_ids"] = (rows.tensors["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    assert torch.equal(compute(engine, "compute_rewards", rows)["rewards"], before)
    rows.tensors["position_ids"][4, 9] += 1
    with pytest.raises(InvalidValue) as caught:
        compute(engine, "compute_rewards", rows)
    assert caught.value.details()["row"] == 4 and caught.value.details()["tensor"] == "position_ids"
    for length in (62, 63):  # of 64 rows of the table two are kept
        ids = torch.full((1, length), 7)
        wide = MemoryRows(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, temperature=1.0
        )
        if length == 62:
            assert compute(engine, "compute_rewards", wide)["rewards"].isfinite().all()
        else:
            with pytest.raises(InvalidValue, match="positions"):
                compute(engine, "compute_rewards", wide)


class PlainCritic(nn.Module):
    """transformers' own base model under a linear layer."""

    def __init__(self, path: str, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.base = AutoModel.from_pretrained(path, dtype=torch.float64).eval()
        self.score = nn.Linear(weight.shape[1], 1, dtype=torch.float64)
        self.score.weight.data, self.score.bias.data = weight.double(), bias.double()

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        states = self.base(input_ids=input_ids).last_hidden_state
        return type("Answer", (), {"logits": F.linear(states, self.score.weight, self.score.bias)})


def exported(engine: Engine, source: str, folder: Path) -> str:
    folder.mkdir()
    stamp = Stamp("t", 1, 1, "0" * 16)
    writer = FolderWriter(
        folder,
        Path(source),
        stamp,
        config_changes=engine.state.config_changes(),
        layout=engine.state.layout(),
    )
    assert export(engine.state.full_weights(), writer) is None
    writer.finish()
    return str(folder)


def head(folder: str) -> tuple[Tensor, Tensor]:
    weights = load_file(Path(folder) / "model.safetensors")
    names = sorted(name for name in weights if name.split(".")[0] in ("score", "classifier"))
    bias, weight = (weights[name] for name in names)
    return weight, bias


@pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module"
)  # OPT's layers return views; nothing changes them in place
@pytest.mark.parametrize("family", CRITICS)
def test_a_critic_of_any_family(tmp_path: Path, family: str) -> None:
    """It begins at 0 and learns; exported, a base model and a linear layer give its values, steps
    and all."""
    path = saved(tmp_path / "model", family, AutoModelForCausalLM, CRITICS[family])
    rows = padded("left")
    cut = {
        "ppo_micro_batch_size_per_gpu": 3,
        "export_dtype": "float64",
        "loss_agg_mode": "token-mean",
    }
    engine = build(path, "critic", **cut)
    assert compute(engine, "compute_values", rows)["values"].abs().max() == 0
    rows.tensors["returns"] = torch.linspace(-1, 1, 56).view(7, 8).double()
    for _ in range(2):
        update(engine, rows, "update_critic")

    folder = exported(engine, path, tmp_path / "exported")
    plain = PlainCritic(folder, *head(folder))
    again = build(folder, "critic", **cut)
    found = compute(again, "compute_values", rows)["values"]
    assert (
        torch.equal(found, compute(engine, "compute_values", rows)["values"]) and found.std() > 1e-3
    )
    for row in range(rows.size):
        columns = scored_columns(rows, row)
        real = rows.tensors["attention_mask"][row].bool()
        values = plain(rows.tensors["input_ids"][row][real][None]).logits[0, :, 0]
        places = [int(real[:column].sum()) - 1 for column in columns]
        assert torch.allclose(
            found[row][[c - 6 for c in columns]], values[places].float(), atol=1e-5
        )

    metrics = update(again, rows, "update_critic")[0].metrics
    loss, optim = Loss("value"), {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}
    made = train(
        plain, rows, loss, value_step(plain, rows, loss, 0.5), [list(range(rows.size))], optim
    )
    assert made.metrics[0] is not None
    assert metrics["critic/grad_norm"] == pytest.approx(made.metrics[0]["grad_norm"], rel=1e-5)
    assert metrics["critic/loss"] == pytest.approx(made.metrics[0]["loss"], rel=1e-6)
    ours = {
        own_name(name): tensor for name, tensor in again.state.full_weights() if tensor is not None
    }
    assert relative_gap({name: ours[name] for name in made.end}, made.end, made.start) < 1e-3


def test_a_critic_without_clipping_steps_on_the_gradient_as_it_is(tmp_path: Path) -> None:
    """grad_clip null: the norm is measured all the same, and the step is a plain loop's that does
    not clip."""
    path = saved(tmp_path / "model", "llama", AutoModelForCausalLM, {})
    rows = padded("left")
    rows.tensors["returns"] = torch.linspace(-100, 300, 56).view(7, 8).double()
    cut = {"ppo_micro_batch_size_per_gpu": 3, "grad_clip": None, "export_dtype": "float64"}
    folder = exported(build(path, "critic", **cut), path, tmp_path / "exported")
    plain = PlainCritic(folder, *head(folder))
    engine = build(path, "critic", **cut)

    metrics = update(engine, rows, "update_critic")[0].metrics

    loss, optim = (
        Loss("value"),
        {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.01, "clip": float("inf")},
    )
    made = train(
        plain, rows, loss, value_step(plain, rows, loss, 0.5), [list(range(rows.size))], optim
    )
    assert made.metrics[0] is not None and made.metrics[0]["grad_norm"] > 10
    assert metrics["critic/grad_norm"] == pytest.approx(made.metrics[0]["grad_norm"], rel=1e-5)
    ours = {
        own_name(name): tensor for name, tensor in engine.state.full_weights() if tensor is not None
    }
    assert relative_gap({name: ours[name] for name in made.end}, made.end, made.start) < 1e-3


def own_name(name: str) -> str:
    """A tensor of a critic as `PlainCritic` names it."""
    first, _, rest = name.partition(".")
    return f"score.{rest}" if first in ("score", "classifier") else f"base.{rest}"


def test_a_critic_whose_rows_would_be_counted_otherwise_is_refused(tmp_path: Path) -> None:
    """RoBERTa counts positions from 2, and a layer stands before ModernBERT's head: one line,
    before any value."""
    path = saved(tmp_path / "roberta", "roberta", AutoModelForTokenClassification, {})
    with pytest.raises(
        InvalidValue, match="no critic can be made of RobertaForTokenClassification"
    ):
        build(path, "critic")
    path = saved(tmp_path / "modernbert", "modernbert", AutoModelForTokenClassification, {})
    with pytest.raises(InvalidValue, match="no critic can be made of a modernbert"):
        build(path, "critic")
