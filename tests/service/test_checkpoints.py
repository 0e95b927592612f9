"""Checkpoints through the whole service: they load, at any world size, and nothing that failed has
changed anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nexrl_client import (
    CheckpointInvalid,
    GradientsPending,
    HDFSNotConfigured,
    HTTPTrainServiceClient,
    PathRefused,
)
from transformers import AutoModelForCausalLM

from tests.helpers.service import StartGroup, fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_training_goes_on_as_if_nothing_had_happened(
    student: HTTPTrainServiceClient, start_group: StartGroup
) -> None:
    """Weights, moments, schedule: two more updates after a load at another world size give the
    weights of the uninterrupted run."""
    batches = [make_batch(seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        student.update_actor(batch)
    student.save_checkpoint("resume/step_2", global_step=2)
    for batch in batches[2:]:
        student.update_actor(batch)

    single = start_group("single", world_size=1)
    loaded = single.load_checkpoint("resume/step_2")
    for batch in batches[2:]:
        single.update_actor(batch)

    assert (loaded["optimizer"], loaded["global_step"], loaded["rng"]) == (
        "restored",
        2,
        "reseeded",
    )
    ours, theirs = (
        client.compute_log_prob(batches[0])["batch"]["old_log_probs"]
        for client in (single, student)
    )
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    single.destroy()


def test_a_load_gives_back_the_very_weights(student: HTTPTrainServiceClient) -> None:
    student.save_checkpoint("exact/step_1", global_step=1)
    before = fingerprint(student)
    student.update_actor(make_batch(seed=11))
    assert fingerprint(student) != before

    assert student.load_checkpoint("exact/step_1")["rng"] == "restored"

    assert fingerprint(student) == before


def test_the_weight_sync_folder_is_a_stable_path_with_two_versions(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    seen = []
    for seed in range(3):
        student.update_actor(make_batch(seed=seed))
        student.save_checkpoint(
            "sync", saved_fully_shared_ckpt=False, save_weight_only=True, remove_previous_ckpt=False
        )
        seen.append((stack.data / "sync").resolve())

    model = AutoModelForCausalLM.from_pretrained(stack.data / "sync", dtype=torch.float32)

    assert (stack.data / "sync").is_symlink()
    assert [folder.exists() for folder in seen] == [False, True, True]
    assert model.config.tie_word_embeddings


def test_an_exported_folder_loads_into_a_group(student: HTTPTrainServiceClient) -> None:
    student.save_checkpoint("export/now", saved_fully_shared_ckpt=False, remove_previous_ckpt=False)
    before = fingerprint(student)
    student.update_actor(make_batch(seed=5))

    student.load_checkpoint("export/now")

    assert fingerprint(student) == before


def test_conversion_of_a_checkpoint_and_of_the_current_weights(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    student.save_checkpoint("convert/step_1", global_step=1)
    before = fingerprint(student)
    student.update_actor(make_batch(seed=6))

    of_checkpoint = student.convert_checkpoint_to_huggingface("convert/step_1")["path"]
    of_weights = student.convert_checkpoint_to_huggingface("convert/current")["path"]

    assert of_checkpoint == str(stack.data / "convert" / "step_1-hf")
    marks = {
        Path(path).name: json.loads((Path(path) / "nexrl.json").read_text())["fingerprint"]
        for path in (of_checkpoint, of_weights)
    }
    assert marks == {"step_1-hf": before, "current": fingerprint(student)}


def test_only_the_previous_full_save_goes_and_only_when_the_new_one_is_there(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    student.save_checkpoint("previous/step_1", global_step=1)
    student.save_checkpoint("previous/weights", saved_fully_shared_ckpt=False)
    student.save_checkpoint("previous/step_2", global_step=2)

    assert sorted(
        path.name for path in (stack.data / "previous").iterdir() if path.name[0] != "."
    ) == [
        "step_2",
        "weights",
    ]


def test_what_cannot_be_loaded_changes_nothing(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    saved = student.save_checkpoint("broken/step_1", global_step=1)["path"]
    shard = next(Path(saved).glob("model.rank0-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    before = fingerprint(student)

    with pytest.raises(CheckpointInvalid, match=shard.name):
        student.load_checkpoint("broken/step_1")
    with pytest.raises(CheckpointInvalid, match="no checkpoint"):
        student.load_checkpoint("broken/step_2")

    assert fingerprint(student) == before


@pytest.mark.parametrize("path", ["/etc/ckpt", "../../outside", "ckpt/../../../x", ".nexrl/x"])
def test_a_path_outside_the_roots_is_refused(student: HTTPTrainServiceClient, path: str) -> None:
    with pytest.raises(PathRefused):
        student.save_checkpoint(path)


def test_a_folder_that_is_not_ours_is_never_replaced(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    mine = stack.data / "precious"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")

    for sharded in (True, False):
        with pytest.raises(PathRefused):
            student.save_checkpoint("precious", saved_fully_shared_ckpt=sharded)

    assert (mine / "notes.txt").read_text() == "mine"


def test_hdfs_and_pending_gradients_are_refused_by_name(student: HTTPTrainServiceClient) -> None:
    with pytest.raises(HDFSNotConfigured):
        student.save_checkpoint("x", hdfs_path="hdfs://cluster/x")
    student.forward_backward(make_batch(), loss="cross_entropy")
    with pytest.raises(GradientsPending):
        student.save_checkpoint("pending")
    with pytest.raises(GradientsPending):
        student.load_checkpoint("sync")
    assert student.optim_step(discard=True)["metrics"]["step_applied"] is False
