"""float32 weights, layers in bfloat16, as on a GPU: every role, packed and padded, near what
float32 gives."""

from __future__ import annotations

from types import SimpleNamespace as Space
from typing import Any

import pytest
import torch
from nexrl_worker.training import Engine
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen2ForTokenClassification

from tests.helpers.engines import SMALL, batch, config, save_model
from tests.helpers.single_rank import CPU, compute, update

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.slow]
HEADS = {"critic": Qwen2ForTokenClassification, "reward": Qwen2ForSequenceClassification}
NEAR = 0.06


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder for every role."""
    folder = tmp_path_factory.mktemp("models")
    found = dict.fromkeys(("actor", "teacher"), save_model(folder / "language"))
    for role, kind in HEADS.items():
        torch.manual_seed(5)
        kind(Qwen2Config(**SMALL, num_labels=1)).save_pretrained(folder / role)  # type: ignore[arg-type]
        found[role] = str(folder / role)
    return found


def engine(paths: dict[str, str], role: str, dtype: str, **changes: Any) -> Engine:
    settings = config(paths[role], dtype="float32", ppo_micro_batch_size_per_gpu=3, **changes)
    settings.fsdp_config.mixed_precision = Space(param_dtype=dtype, reduce_dtype="float32")
    made = Engine.build(settings, role, CPU)
    info = made.info()
    assert info["compute_dtype"] == dtype and info["packing"] is settings.model.use_remove_padding
    return made


@pytest.mark.parametrize("packing", [False, True])
def test_an_update_starts_at_ratio_one_and_takes_float32s_step(
    paths: dict[str, str], packing: bool
) -> None:
    norms = {}
    for dtype in ("float32", "bfloat16"):
        actor, rows = engine(paths, "actor", dtype, packing=packing, entropy_coeff=0.1), batch()
        rows.tensors["old_log_probs"] = compute(actor, "compute_log_prob", rows)["old_log_probs"]
        [result] = update(actor, rows)
        assert result.metrics["actor/ratio_min"] == result.metrics["actor/ratio_max"] == 1.0
        norms[dtype] = result.metrics["actor/grad_norm"]
    assert norms["bfloat16"] != norms["float32"] == pytest.approx(norms["bfloat16"], rel=NEAR)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_student_learns_from_a_teachers_top_k(
    paths: dict[str, str], kind: str, packing: bool
) -> None:
    """The teacher sees the text at another temperature; a student that is its equal at the same one
    has nothing to learn."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        rows, warmer = batch(), batch(temperature=1.4)
        top = compute(
            engine(paths, "teacher", dtype, packing=packing), "compute_log_prob", warmer, top_k=5
        )
        rows.tensors |= {name: tensor for name, tensor in top.items() if name != "old_log_probs"}
        student = engine(paths, "actor", dtype, packing=packing, distillation_loss=kind)
        found[dtype] = update(student, rows, "update_actor_with_distillation")[0].metrics
    for name in ("actor/teacher_kl", "actor/grad_norm"):
        assert (
            found["bfloat16"][name] == pytest.approx(found["float32"][name], rel=NEAR)
            and found["float32"][name] > 1e-3
        )


@pytest.mark.parametrize("packing", [False, True])
def test_values_and_rewards(paths: dict[str, str], packing: bool) -> None:
    norms = {}
    rewards = {}
    for dtype in ("float32", "bfloat16"):
        critic, rows = engine(paths, "critic", dtype, packing=packing), batch()
        rows.tensors["returns"] = rows.tensors["advantages"]
        rows.tensors["values"] = compute(critic, "compute_values", rows)["values"]
        norms[dtype] = update(critic, rows, "update_critic")[0].metrics["critic/grad_norm"]
        rewards[dtype] = compute(
            engine(paths, "reward", dtype, packing=packing), "compute_rewards", batch()
        )["rewards"]
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=NEAR)
    gap = (rewards["bfloat16"] - rewards["float32"]).norm() / rewards["float32"].norm()
    assert 0 < gap < 3 * NEAR
