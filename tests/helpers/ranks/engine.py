"""What the ranks of most tests run: checks by name, of engines of world size ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.errors import ServiceError
from nexrl_worker.training import Engine, InvalidValue, Plan
from nexrl_worker.training.state import rng_state, set_rng_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.engines import MemoryRows, batch, config, planned
from tests.helpers.rank_processes import be_a_rank

CPU = torch.device("cpu")


def build(path: str, role: str = "actor", **changes: Any) -> Engine:
    return Engine.build(config(path, **changes), role, CPU)


def run(engine: Engine, operation: str, rows: MemoryRows, **params: Any) -> Any:
    """Plan, broadcast as JSON, check, run: what the runtime does."""
    prepared, plan = planned(engine, operation, rows, **params)
    text = [json.dumps(plan.to_dict()) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(text)
    plan = Plan.from_dict(json.loads(text[0]))
    engine.check(prepared, plan)
    if operation == "forward_backward":
        return engine.accumulate(prepared, plan).metrics
    if operation.startswith("update"):
        steps = [result.metrics for result in engine.update(prepared, plan)]
        return (
            steps[0]
            if len(steps) == 1
            else {name: [step.get(name) for step in steps] for name in steps[0]}
        )
    (parts,) = engine.compute(prepared, plan).answers.values()
    return parts


def collect(engine: Engine, operation: str, rows: MemoryRows, **params: Any) -> Tensor:
    """Log-probabilities of all ranks, in the batch's order."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, run(engine, operation, rows, **params))
    result = torch.full(
        (rows.size, parts[0][0][1].shape[1] if parts[0] else parts[1][0][1].shape[1]), float("nan")
    )
    for indices, values in (pair for part in parts for pair in part):
        result[indices] = values
    return result


def weights(engine: Engine) -> dict[str, Tensor]:
    return {
        name: tensor.clone() for name, tensor in engine.state.full_weights() if tensor is not None
    }


def save(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            str(folder / f"{name}.safetensors"),
        )


def training(folder: Path, cases_file: str) -> dict[str, Any]:
    """Each case: two updates of two mini-batches; weights to a file, metrics to the answer."""
    answer = {}
    for name, case in json.loads(Path(cases_file).read_text()).items():
        engine = build(case["path"], **case["config"])
        results = [run(engine, "update_actor", batch()) for _ in range(2)]
        save(folder, f"{name}-{dist.get_world_size()}", weights(engine))
        answer[name] = results
    return answer


def behaviour(folder: Path, path: str) -> dict[str, Any]:
    """Small facts, each under its own name; see test_ranks.py for what is promised."""
    answer: dict[str, Any] = {"fingerprints": []}
    settings: dict[str, Any] = {
        "entropy_coeff": 0.1,
        "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "ppo_micro_batch_size_per_gpu": 3,
        "optim": {"no_decay": "norms and biases"},
    }
    engine = build(path, **settings)
    answer["info"] = engine.info()
    answer["fingerprints"].append(str(engine.state.fingerprint()))
    rows = batch()
    answer["one_row"] = run(engine, "update_actor", rows.pick([1]))
    answer["fingerprints"].append(str(engine.state.fingerprint()))
    before = engine.state.fingerprint()
    answer["all_masked"] = run(engine, "update_actor", rows.pick([3]))
    answer["all_masked_unchanged"] = engine.state.fingerprint() == before
    save(folder, f"masked-plain-{dist.get_world_size()}", gradients(engine, rows))
    save(folder, f"masked-poisoned-{dist.get_world_size()}", gradients(engine, poisoned(rows)))
    answer["halves"] = [
        run(engine, "forward_backward", rows.pick(part)) for part in ([0, 1, 2], [3, 4, 5, 6])
    ]
    answer["pending"] = engine.state.pending
    answer["optim_step"] = engine.step()
    save(folder, f"halves-{dist.get_world_size()}", weights(engine))
    answer["not_finite"] = not_finite(engine, rows)
    answer["refused"] = refused(engine, rows)
    answer["reference"] = reference(engine, rows)
    answer["whole"] = whole(folder, path, rows, settings)
    answer["first_ratio"] = first_ratio(path, rows)
    answer["teacher"] = teacher(path, rows)
    answer["state"] = state(folder, path, rows, settings)
    answer["distillation"] = distillation(path, rows)
    return answer


def memory(_: Path, path: str) -> dict[str, Any]:
    """A step with room for everything, and one with room for a row."""
    whole, cut = build(path), build(path)
    rooms: list[Any] = [None, None]
    dist.all_gather_object(rooms, whole.room.mib)
    cut.room = replace(cut.room, mib=1e-3)
    micros = [
        len(planned(engine, "update_actor", batch())[1].mini_batches[0].ranks[0])
        for engine in (whole, cut)
    ]
    for engine in (whole, cut):
        run(engine, "update_actor", batch())
    ours, theirs = weights(whole), weights(cut)
    return {
        "rooms": rooms,
        "micros": micros,
        "difference": max((float((ours[k] - theirs[k]).abs().max()) for k in ours), default=0.0),
    }


def gradients(engine: Engine, rows: MemoryRows) -> dict[str, Tensor]:
    run(engine, "forward_backward", rows)
    found = {
        name: param.grad.full_tensor().clone()
        # what a caller cannot see, but a test must
        for name, param in engine._model.hf.named_parameters()
    }
    engine.step(discard=True)
    return found


def poisoned(rows: MemoryRows) -> MemoryRows:
    tensors = {name: value.clone() for name, value in rows.tensors.items()}
    masked = tensors["scoring_attention_mask"][:, -8:] == 0
    for name in ("advantages", "old_log_probs", "ref_log_prob"):
        tensors[name][masked] = float("nan")
    return MemoryRows(tensors, **rows.metadata)


def state_of(engine: Engine) -> list[Any]:
    """Every rank's weights and moments, hashed, with the schedule's position, AdamW's count and the
    pending gradients."""
    digest = hashlib.sha256()
    for part in engine.state.shards():
        digest.update(part.name.encode() + part.local_tensor.contiguous().numpy().tobytes())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        every, [digest.hexdigest(), engine.state.scalars(), engine.state.pending]
    )
    return every


def not_finite(engine: Engine, rows: MemoryRows) -> dict[str, Any]:
    huge = {**rows.tensors, "advantages": torch.full_like(rows.tensors["advantages"], 1e308)}
    before = state_of(engine)
    result = run(engine, "update_actor", MemoryRows(huge, temperature=1e-3))
    return {**result, "unchanged": before == state_of(engine)}


def refused(engine: Engine, rows: MemoryRows) -> dict[str, Any]:
    """Every bad batch raises on the rank that reads the row; the answer holds what was raised, per
    rank."""
    place = (4, 8)  # a scored token: row 4, k = 2
    row, column = place
    assert rows.tensors["scoring_attention_mask"][place] == 1

    def changed(name: str, at: tuple[int, int], value: float) -> MemoryRows:
        tensor = rows.tensors[name].clone()
        tensor[at] = value
        return MemoryRows({**rows.tensors, name: tensor}, **rows.metadata)

    bad = {
        "nan": changed("advantages", (row, column - 6), float("nan")),
        "id": changed("input_ids", place, 61),
        "mask": changed("attention_mask", place, 2),
        "shape": MemoryRows({**rows.tensors, "advantages": torch.zeros(7, 5)}, **rows.metadata),
        "temperature": MemoryRows(rows.tensors, temperature=0.0),
        "missing": MemoryRows(
            {k: v for k, v in rows.tensors.items() if k != "advantages"}, **rows.metadata
        ),
    }
    found = {}
    before = state_of(engine)
    for name, broken in bad.items():
        mine: Any = None
        try:
            engine.check(*planned(engine, "update_actor", broken))
        except InvalidValue as error:
            mine = error.details() | {"message": error.message}
        except ServiceError as error:
            mine = error.details | {"message": error.message}
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        found[name] = every
    found["unchanged"] = [before == state_of(engine)]
    run(engine, "update_actor", rows)
    found["goes_on"] = [
        all(one[0] != other[0] for one, other in zip(before, state_of(engine), strict=True))
    ]
    return found


def reference(engine: Engine, rows: MemoryRows) -> dict[str, Any]:
    own, frozen = (collect(engine, f"compute_{kind}log_prob", rows) for kind in ("", "ref_"))
    return {"moved": float((own - frozen).abs().max()), "frozen": frozen.tolist()}


def whole(folder: Path, path: str, rows: MemoryRows, settings: dict[str, Any]) -> dict[str, Any]:
    """The same weights as `behaviour` reached in halves, by update_actor on all rows."""
    engine = build(path, **settings)
    run(engine, "update_actor", rows.pick([1]))
    result = run(engine, "update_actor", rows)
    save(folder, f"whole-{dist.get_world_size()}", weights(engine))
    return result


def first_ratio(path: str, rows: MemoryRows) -> list[Any]:
    cuts = (
        {"ppo_micro_batch_size_per_gpu": 3},
        {
            "use_dynamic_bsz": True,
            "ppo_max_token_len_per_gpu": 30,
            "shuffle": True,
            "ppo_mini_batch_size": 4,
        },
        {},
    )
    found = []
    for cut in cuts:
        engine = build(path, dtype="float32", **cut)
        old = collect(engine, "compute_log_prob", rows)
        found.append(
            run(
                engine,
                "update_actor",
                MemoryRows({**rows.tensors, "old_log_probs": old}, **rows.metadata),
            )
        )
    return found


def teacher(path: str, rows: MemoryRows) -> dict[str, Any]:
    engine = build(path, role="teacher")
    scores = collect(engine, "compute_log_prob", rows)
    message = ""
    try:
        run(engine, "update_actor", rows)
    except InvalidValue as error:
        message = error.message
    grads = any(param.requires_grad for param in engine._model.hf.parameters())
    return {
        "scores": scores.tolist(),
        "update": message,
        "trainable": grads,
        "shards": sum(1 for _ in engine.state.shards()),
    }


class File:
    """Reads rows of a safetensors file, as a checkpoint's reader does."""

    def __init__(self, path: Path) -> None:
        self.file = safe_open(str(path), framework="pt")

    def read(self, name: str, offset: int, length: int) -> Tensor:
        return self.file.get_slice(name)[offset : offset + length]


def state(folder: Path, path: str, rows: MemoryRows, settings: dict[str, Any]) -> dict[str, Any]:
    """Two ranks save after one update and make another; any world size that loads must arrive at
    the same weights."""
    saved = folder / "state.safetensors"
    world = dist.get_world_size()
    if world == 2:
        engine = build(path, **settings)
        run(engine, "update_actor", rows)
        parts: list[Any] = [None] * world
        dist.all_gather_object(
            parts,
            [
                (s.name, s.local_tensor.clone(), s.global_shape, s.offset_dim0)
                for s in engine.state.shards()
            ],
        )
        tensors: dict[str, Tensor] = {}
        for name, local, shape, offset in (piece for part in parts for piece in part):
            tensors.setdefault(name, torch.full(shape, float("nan"), dtype=local.dtype))[
                offset : offset + len(local)
            ] = local
        save(folder, "state", tensors)
        if dist.get_rank() == 0:
            (folder / "state.json").write_text(json.dumps(engine.state.scalars()))
        dist.barrier()
        random = rng_state()
        drawn = torch.rand(3)
        set_rng_state(json.loads(json.dumps(random)))
        assert torch.equal(drawn, torch.rand(3))
    else:
        engine = build(path, **settings)
        engine.state.load_shards(File(saved))
        engine.state.load_scalars(json.loads((folder / "state.json").read_text()))
    result = run(engine, "update_actor", rows)
    save(folder, f"resumed-{world}", weights(engine))
    return {"scalars": engine.state.scalars(), "grad_norm": result["actor/grad_norm"]}


def distillation(path: str, rows: MemoryRows) -> list[Any]:
    """Two teachers, with and without old log-probabilities."""
    found = []
    for number in range(2):
        for name in ("reinforce", "importance_sampling"):
            tensors = {k: v for k, v in rows.tensors.items() if k != "advantages"}
            tensors["teacher_log_probs"] = rows.tensors["ref_log_prob"] - number
            if name == "reinforce":
                del tensors["old_log_probs"]
            engine = build(path)
            found.append(
                run(engine, "update_actor_with_distillation", MemoryRows(tensors, **rows.metadata))
            )
    return found


if __name__ == "__main__":
    be_a_rank({"memory": memory, "training": training, "behaviour": behaviour})
