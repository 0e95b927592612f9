"""One rank in this process: what each role computes, against transformers' own classes and
formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nexrl_contract.errors import ServiceError
from nexrl_contract.sections import RolloutCorrectionConfig
from nexrl_worker.checkpoint.huggingface import FolderWriter, Stamp, export
from nexrl_worker.training import Engine, InvalidValue
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from tests.helpers.engines import (
    SMALL,
    MemoryRows,
    batch,
    plain_scores,
    planned,
    relative_gap,
    save_model,
)
from tests.helpers.plain_loop import Loss, outputs_at, policy_step, scored_columns, train
from tests.helpers.single_rank import build, compute, update

PAD = 0


pytestmark = pytest.mark.usefixtures("one_rank")


def gradients(engine: Engine, operation: str, rows: MemoryRows, **params: Any) -> dict[str, Tensor]:
    """Of `forward_backward`, undivided; or what an update's optimizer step gets."""
    found: dict[str, Tensor] = {}

    def seen(*_: Any) -> None:
        for name, param in engine._model.hf.named_parameters():
            found[name] = param.grad.full_tensor().clone()
        engine._trainer.optimizer.discard()

    engine._trainer.optimizer.step = seen
    update(engine, rows, operation, **params)
    return found


def headed(folder: Path, kind: Any) -> str:
    """A tiny Qwen2 with a random head of one output."""
    torch.manual_seed(4)
    kind(
        Qwen2Config(**SMALL, num_labels=1, tie_word_embeddings=True, pad_token_id=PAD)
    ).save_pretrained(folder)
    return str(folder)


def padded(padding: str) -> MemoryRows:
    """Rows that never hold the padding id among their tokens, and nothing else between them."""
    rows = batch()
    attention = torch.ones_like(rows.tensors["attention_mask"])
    for row in range(rows.size):
        if padding == "left":
            attention[row, : row % 5] = 0
        elif padding == "right":
            attention[row, 14 - row % 5 :] = 0
        else:
            attention[row, [2, 5 + row, 13]] = 0
    ids = torch.randint(1, 61, attention.shape, generator=torch.Generator().manual_seed(2))
    ids[attention == 0] = PAD
    return MemoryRows({"input_ids": ids, "attention_mask": attention, "responses": ids[:, 6:]})


def own_answers(model: Any, rows: MemoryRows) -> Tensor:
    attention = rows.tensors["attention_mask"]
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        answers = model(
            input_ids=rows.tensors["input_ids"], attention_mask=attention, position_ids=positions
        )
    return answers.logits


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_rewards(tmp_path: Path, padding: str, packing: bool) -> None:
    """compute_rewards pools at the last attended token, as transformers' sequence classification
    does."""
    path = headed(tmp_path, Qwen2ForSequenceClassification)
    rows = padded(padding)
    found = compute(
        build(path, "reward", packing=packing, ppo_micro_batch_size_per_gpu=3),
        "compute_rewards",
        rows,
    )
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64).eval()
    wanted = own_answers(model, rows)[:, 0]
    assert found["rewards"].shape == (7,) and wanted.std() > 0.1
    assert torch.allclose(found["rewards"], wanted.float(), atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_values(tmp_path: Path, padding: str, packing: bool) -> None:
    """values[:, k] is transformers' token classification at position S-R-1+k, wherever k and k-1
    are attended."""
    path = headed(tmp_path, Qwen2ForTokenClassification)
    rows = padded(padding)
    found = compute(
        build(path, "critic", packing=packing, ppo_micro_batch_size_per_gpu=3),
        "compute_values",
        rows,
    )
    model = AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float64).eval()
    wanted = own_answers(model, rows)[:, 5:13, 0]
    attention = rows.tensors["attention_mask"].bool()
    sure = attention[:, 6:] & attention[:, 5:13]
    assert sure.any(dim=1).all() and wanted.std() > 0.1
    assert torch.allclose(found["values"][sure], wanted.float()[sure], atol=1e-6)
    assert found["values"][~attention[:, 6:]].abs().max() == 0 if padding == "right" else True


def exported(engine: Engine, source: str, folder: Path) -> str:
    folder.mkdir()
    writer = FolderWriter(
        folder,
        Path(source),
        Stamp("t", 1, 1, "0" * 16),
        config_changes=engine.state.config_changes(),
    )
    assert export(engine.state.full_weights(), writer) is None
    writer.finish()
    return str(folder)


def test_critic(tmp_path: Path) -> None:
    """Of a language model it starts at 0; trained and exported, transformers and a new critic load
    its values."""
    path = save_model(tmp_path / "causal")
    rows = padded("left")
    engine = build(path, "critic", ppo_micro_batch_size_per_gpu=3)
    assert compute(engine, "compute_values", rows)["values"].abs().max() == 0
    rows.tensors["returns"] = torch.linspace(-1, 1, 56).view(7, 8)
    for _ in range(3):
        update(engine, rows, "update_critic")
    values = compute(engine, "compute_values", rows)["values"]
    assert values.std() > 1e-3
    folder = exported(engine, path, tmp_path / "exported")
    again = compute(build(folder, "critic"), "compute_values", rows)["values"]
    assert torch.allclose(again, values, atol=1e-7)
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float64).eval()
    assert model.config.num_labels == 1
    sure = (rows.tensors["attention_mask"][:, 6:] & rows.tensors["attention_mask"][:, 5:13]).bool()
    assert torch.allclose(
        own_answers(model, rows)[:, 5:13, 0].float()[sure], values[sure], atol=1e-6
    )


def test_explained_variance_of_equal_returns(tmp_path: Path) -> None:
    """Returns that do not vary have no variance to explain: 0, not what rounding makes of it."""
    rows = padded("right")
    rows.tensors["returns"] = torch.full((7, 8), 0.1)
    engine = build(headed(tmp_path, Qwen2ForTokenClassification), "critic", dtype="float32")
    metrics = update(engine, rows, "update_critic")[0].metrics
    assert metrics["critic/explained_variance"] == 0.0 and metrics[
        "critic/returns_mean"
    ] == pytest.approx(0.1)


@pytest.mark.parametrize("k", [1, 7, 61])
def test_top_k(tmp_path: Path, k: int) -> None:
    """compute_log_prob(top_k=K) gives torch.topk of log_softmax at every attended label, and the
    labels' own."""
    path = save_model(tmp_path)
    rows = batch()
    found = compute(
        build(path, "teacher", ppo_micro_batch_size_per_gpu=2), "compute_log_prob", rows, top_k=k
    )
    assert found.keys() == {"old_log_probs", "teacher_topk_ids", "teacher_topk_log_probs"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids, attention = rows.tensors["input_ids"], rows.tensors["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(
            found["old_log_probs"], plain_scores(model, rows)[0].float(), atol=1e-6
        )
        for row in range(rows.size):
            logs = torch.log_softmax(
                model(input_ids=ids[row][attention[row]][None]).logits[0] / 0.7, dim=-1
            )
            columns = [c for c in range(6, 14) if attention[row, c] and attention[row, :c].any()]
            best = logs[[int(attention[row, :c].sum()) - 1 for c in columns]].topk(k, dim=-1)
            places = [c - 6 for c in columns]
            assert torch.equal(found["teacher_topk_ids"][row, places], best.indices)
            assert torch.allclose(
                found["teacher_topk_log_probs"][row, places], best.values.float(), atol=1e-6
            )
    with pytest.raises(InvalidValue, match="62"):
        compute(build(path, "teacher"), "compute_log_prob", rows, top_k=62)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_temperature_of_each_row(tmp_path: Path, packing: bool, top_k: int | None) -> None:
    """A row is scored as alone at its own temperature, whichever else is in the batch, and whatever
    the metadata say."""
    path = save_model(tmp_path)
    rows = batch(temperature=3.0)
    each = torch.tensor(
        [0.5, 1.0, 1.7, float("nan"), 0.9, 1.3, 2.0], dtype=torch.float64
    )  # row 3 scores nothing
    rows.tensors["temperature"] = each
    engine = build(path, "actor", packing=packing)
    found = compute(engine, "compute_log_prob", rows, top_k=top_k)
    for row in (0, 1, 2, 4, 5, 6):
        alone = MemoryRows(
            {name: value[[row]] for name, value in batch().tensors.items()},
            temperature=float(each[row]),
        )
        wanted = compute(engine, "compute_log_prob", alone, top_k=top_k)
        assert all(
            torch.equal(found[name][row], wanted[name][0])
            for name in wanted
            if name.endswith("ids")
        )
        assert all(torch.allclose(found[name][row], wanted[name][0], atol=1e-6) for name in wanted)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_temperature_of_each_row_divides_logits_that_are_the_familys_own(
    tmp_path: Path, family: str
) -> None:
    """Capped or scaled first, divided then: scores, entropy and the step are those of a plain loop
    over the rows."""
    torch.manual_seed(0)
    own = {"head_dim": 8, "final_logit_softcapping": 2.0} if family == "gemma2" else {}
    keys = {**SMALL, "logits_scaling": 3.0, "tie_word_embeddings": True, **own}
    path = str(tmp_path)
    AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**keys, pad_token_id=PAD)
    ).save_pretrained(path)
    rows = batch(temperature=3.0)
    rows.tensors["temperature"] = torch.tensor(
        [0.5, 1.0, 1.7, float("nan"), 0.9, 1.3, 2.0], dtype=torch.float64
    )
    engine = build(path, "actor", entropy_coeff=0.1, ppo_micro_batch_size_per_gpu=3)
    assert not engine.info()["chunked_log_probs"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    names = ("advantages", "old_log_probs")
    loss, optim = (
        Loss("ppo", entropy=0.1),
        {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0},
    )
    found = compute(engine, "compute_log_prob", rows)["old_log_probs"]
    with torch.no_grad():
        for row in (0, 1, 2, 4, 5, 6):
            columns = scored_columns(rows, row)
            logs = torch.log_softmax(
                outputs_at(model, rows, row, columns) / rows.tensors["temperature"][row], dim=-1
            )
            wanted = logs[range(len(columns)), rows.tensors["input_ids"][row][columns]]
            assert torch.allclose(found[row][[c - 6 for c in columns]].double(), wanted, atol=1e-6)

    metrics = update(engine, rows)[0].metrics

    made = train(
        model, rows, loss, policy_step(model, rows, loss, names), [list(range(rows.size))], optim
    )
    assert made.metrics[0] is not None
    for name in ("grad_norm", "entropy_loss", "pg_loss"):
        assert metrics[f"actor/{name}"] == pytest.approx(made.metrics[0][name], rel=1e-5)
    ours = {name: tensor for name, tensor in engine.state.full_weights() if tensor is not None}
    assert relative_gap(ours, made.end, made.start) < 1e-4


def test_responses_that_are_not_in_the_batch_are_refused(tmp_path: Path) -> None:
    """Scored and trained on is what stands in input_ids; other responses beside it were meant
    otherwise."""
    rows = batch()
    engine = build(save_model(tmp_path), "actor")
    attended = rows.tensors["attention_mask"][:, -8:].bool()
    rows.tensors["responses"] = torch.where(
        attended, rows.tensors["responses"], -7
    )  # padding is anyone's
    wanted = compute(engine, "compute_log_prob", batch())["old_log_probs"]
    assert torch.equal(compute(engine, "compute_log_prob", rows)["old_log_probs"], wanted)
    row, column = attended[4:].nonzero()[0].tolist()
    rows.tensors["responses"][row + 4, column] += 1
    for operation in ("compute_log_prob", "update_actor"):
        with pytest.raises(
            InvalidValue, match=f"in row {row + 4}, column {column}, expected"
        ) as caught:
            (compute if operation == "compute_log_prob" else update)(
                engine, operation=operation, rows=rows
            )
        assert (caught.value.tensor, caught.value.row, caught.value.column) == (
            "responses",
            row + 4,
            column,
        )


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    """Advantages of integers train as the same numbers in floats."""
    path, found = save_model(tmp_path), []
    for dtype in (torch.float32, torch.int64, torch.int8):
        rows = batch()
        rows.tensors["advantages"] = torch.tensor([1, -1, 2, 0, 1, -2, 1]).to(dtype)
        found.append(update(build(path, "actor"), rows)[0].metrics["actor/grad_norm"])
    assert found[0] == found[1] == found[2] > 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused_by_its_row(tmp_path: Path, bad: float) -> None:
    """Where the row scores anything."""
    rows = batch()
    rows.tensors["temperature"] = torch.tensor([1.0, 1.0, 1.0, 1.0, bad, 1.0, 1.0])
    with pytest.raises(InvalidValue, match=r"temperature holds .* in row 4") as caught:
        compute(build(save_model(tmp_path), "actor"), "compute_log_prob", rows)
    assert caught.value.tensor == "temperature"


def test_without_clipping_the_norm_is_measured_all_the_same(tmp_path: Path) -> None:
    """grad_clip null: the step is AdamW's on the gradient as it is."""
    path, rows = save_model(tmp_path), batch()
    rows.tensors["advantages"] *= 100
    ends: list[dict[str, Tensor]] = []
    norms: list[float] = []
    for clip in (None, 1e9):
        engine = build(path, "actor", grad_clip=clip)
        norms.append(update(engine, rows)[0].metrics["actor/grad_norm"])
        ends.append(
            {
                name: param.full_tensor().clone()
                for name, param in engine._model.hf.named_parameters()
            }
        )
    assert norms[0] == norms[1] > 1.0
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_linear(tmp_path: Path) -> None:
    """`linear` answers with log-probabilities, and with w = dL/dlp has the gradient of a loss made
    outside."""
    path = save_model(tmp_path)
    rows = batch()
    engine = build(
        path, "actor", policy_loss="linear", grad_clip=0.0, ppo_micro_batch_size_per_gpu=2
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    mask = rows.tensors["scoring_attention_mask"][:, 6:].bool()
    outside = plain_scores(model, rows)[0]
    outside.retain_grad()
    loss = torch.sigmoid(3 * outside[mask]).square().mean() + outside[mask].std()
    loss.backward()
    rows.tensors["loss_weights"] = outside.grad.where(mask, float("nan"))
    parts = update(build(path, "actor", policy_loss="linear"), rows)[0].answers["log_probs"]
    assert torch.allclose(torch.cat([p for _, p in parts]), outside.detach().float(), atol=1e-6)
    found = gradients(engine, "update_actor", rows)
    wanted = {name: param.grad for name, param in model.named_parameters()}
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12) for name in wanted)


@pytest.mark.parametrize("old", [True, False])
def test_two_teachers(tmp_path: Path, old: bool) -> None:
    """The gradient follows the teacher: the gap of two teachers' gradients is that of an advantage
    of their gap."""
    path = save_model(tmp_path)
    rows = batch()
    teachers = [
        rows.tensors["ref_log_prob"] + shift for shift in (0.0, torch.linspace(-1, 1, 8).double())
    ]
    del rows.tensors["advantages"]
    if not old:
        del rows.tensors["old_log_probs"]
    found = []
    for teacher in teachers:
        rows.tensors["teacher_log_probs"] = teacher
        engine = build(path, "actor")
        found.append(
            gradients(engine, "update_actor_with_distillation", rows, distillation_coeff=0.5)
        )
    rows.tensors["advantages"] = 0.5 * (teachers[1] - teachers[0])
    name = "importance_sampling" if old else "reinforce"
    wanted = gradients(build(path, "actor", policy_loss=name), "update_actor", rows)
    gap = sum(
        float((found[1][key] - found[0][key] - value).square().sum())
        for key, value in wanted.items()
    )
    length = sum(float(value.square().sum()) for value in wanted.values())
    assert (gap / length) ** 0.5 < 1e-5  # Qwen2's norms compute in float32 whatever the dtype
    assert length > 1e-3


def candidates(rows: MemoryRows, k: int = 3) -> MemoryRows:
    logs = torch.log_softmax(
        torch.randn(7, 8, 61, generator=torch.Generator().manual_seed(0)).double(), dim=-1
    )
    best = logs.topk(k, dim=-1)
    more = {"teacher_topk_ids": best.indices, "teacher_topk_log_probs": best.values}
    return MemoryRows({**rows.tensors, **more}, **rows.metadata)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_bad_candidates_are_refused(tmp_path: Path, kind: str) -> None:
    """Ids beyond the vocabulary, ids twice, too much mass, NaN and wrong shapes: refused by name
    and row; masked, not."""
    engine = build(save_model(tmp_path), "actor", distillation_loss=kind)
    good = candidates(batch())
    operation = "update_actor_with_distillation"
    engine.check(*planned(engine, operation, good))
    mask = good.tensors["scoring_attention_mask"][:, 6:].bool()
    row, k = (int(n) for n in mask.nonzero()[-1])

    def changed(name: str, place: tuple[int, ...], value: Any) -> MemoryRows:
        tensor = good.tensors[name].clone()
        tensor[place] = value
        return MemoryRows({**good.tensors, name: tensor}, **good.metadata)

    ids, logs = "teacher_topk_ids", "teacher_topk_log_probs"
    bad = [
        changed(ids, (row, k, 1), 61),
        changed(ids, (row, k, 2), -1),
        changed(ids, (row, k, 1), int(good.tensors[ids][row, k, 0])),
        changed(logs, (row, k), -0.5),
        changed(logs, (row, k, 1), float("nan")),
    ]
    for rows in bad:
        with pytest.raises(InvalidValue) as caught:
            engine.check(*planned(engine, operation, rows))
        assert caught.value.details()["row"] == row and caught.value.details()["tensor"] in (
            ids,
            logs,
        )
    for name, value in ((ids, 10_000), (logs, float("nan"))):
        engine.check(
            *planned(engine, operation, changed(name, (~mask).nonzero()[0].unbind(), value))
        )
    short = MemoryRows({**good.tensors, ids: good.tensors[ids][:, :-1]}, **good.metadata)
    with pytest.raises(ServiceError, match=ids):
        planned(engine, operation, short)


def test_settings_that_lack_something_are_refused(tmp_path: Path) -> None:
    """A correction without rollout_log_probs, a norm without its factor, `linear` without
    weights."""
    path = save_model(tmp_path)
    correction = RolloutCorrectionConfig(mode="token_mask", lower=0.5, upper=2.0)
    for changes, message in (
        ({"rollout_correction": correction}, "rollout_log_probs"),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, "loss_scale_factor"),
        ({"policy_loss": "linear"}, "loss_weights"),
    ):
        engine = build(path, "actor", **changes)
        with pytest.raises((InvalidValue, ServiceError), match=message):
            update(engine, batch())
