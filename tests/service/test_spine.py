"""The lines of the README against a running stack, and what their answers mean."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from nexrl_client import GroupExists, HTTPTrainServiceClient
from transformers import AutoModelForCausalLM

from tests.helpers.service import StartGroup, fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
README = Path(__file__).parents[2] / "README.md"


def test_the_lines_of_the_readme_work_as_they_stand(
    stack: Stack, tiny_model: Path, tmp_path: Path
) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for written, ours in (
        ("http://127.0.0.1:8000", stack.url),
        ("/models/tiny", str(tiny_model)),
        ("student", "readme"),
    ):
        assert written in lines
        lines = lines.replace(written, ours)
    (program := tmp_path / "readme.py").write_text(lines)
    names = runpy.run_path(str(program), {"batch": make_batch()})
    batch, result = names["batch"], names["result"]

    assert batch["tensors"]["old_log_probs"].shape == (5, 6)
    assert batch["tensors"]["old_log_probs"].dtype == torch.float32
    assert result["metrics"] is result["meta_info"]["metrics"]
    assert result["metrics"]["actor/grad_norm"] > 0
    assert result["metrics"]["actor/ratio_mean"] == 1.0, "the first ratio is exactly 1"
    assert (stack.data / "ckpt" / "step_1" / "manifest.json").is_file()
    names["client"].destroy()


def test_log_probs_are_transformers_own_in_row_order(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    student.save_checkpoint(
        "spine/weights", saved_fully_shared_ckpt=False, remove_previous_ckpt=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        stack.data / "spine" / "weights", dtype=torch.float32
    )
    batch = make_batch(rows=7)
    tensors = batch["tensors"]
    positions = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)

    ours = student.compute_log_prob(batch)["batch"]["old_log_probs"]

    with torch.no_grad():
        logits = model(
            tensors["input_ids"], attention_mask=tensors["attention_mask"], position_ids=positions
        ).logits
    theirs = torch.log_softmax(logits[:, :-1], -1).gather(-1, tensors["input_ids"][:, 1:, None])[
        ..., 0
    ][:, -6:]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_two_halves_equal_the_whole(
    start_group: StartGroup, student: HTTPTrainServiceClient
) -> None:
    """forward_backward on two halves of a batch and one optim_step move the weights as one
    update_actor does, on one rank as on two."""
    whole, halves = student, start_group("halves", world_size=1)
    whole.save_checkpoint("spine/start", remove_previous_ckpt=False)
    halves.load_checkpoint("spine/start")
    batch = make_batch(rows=6, seed=3)
    whole.update_actor(batch)
    for part in (slice(0, 2), slice(2, 6)):
        halves.forward_backward(
            {
                "tensors": {k: v[part] for k, v in batch["tensors"].items()},
                "metadata": batch["metadata"],
            }
        )
    halves.optim_step()

    after = [client.compute_log_prob(batch)["batch"]["old_log_probs"] for client in (whole, halves)]

    torch.testing.assert_close(after[0], after[1], atol=2e-5, rtol=0)
    halves.destroy()


def test_a_group_that_is_there_is_not_made_again(
    student: HTTPTrainServiceClient, tiny_model: Path
) -> None:
    same = {"actor": {"model": {"path": str(tiny_model)}, "optim": {"lr": 1e-3}}}
    before = fingerprint(student)

    assert (
        student.initialize_worker(config_dict=same, role="actor", world_size=2)["already"] is True
    )
    assert student.init_model()["already"] is True
    with pytest.raises(GroupExists, match=r"optim\.lr"):
        student.initialize_worker(
            config_dict={"actor": {**same["actor"], "optim": {"lr": 1e-4}}}, world_size=2
        )
    assert fingerprint(student) == before


def test_a_trainer_and_a_controller_share_one_group(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    controller = HTTPTrainServiceClient(stack.url, "student")
    batch = make_batch()

    handles = [
        client.submit("compute_log_prob", batch) for client in (student, controller, student)
    ]
    answers = [handle.result(60)["batch"]["old_log_probs"] for handle in handles]

    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_the_only_group_needs_no_name_and_several_do(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    nameless = HTTPTrainServiceClient(stack.url)

    assert nameless.barrier()["identifier"] == "student"


def test_supervised_steps_lower_the_loss(start_group: StartGroup) -> None:
    client = start_group("sft", world_size=1)
    batch = make_batch(rows=4, seed=9)

    losses = []
    for _ in range(8):
        losses.append(client.forward_backward(batch, loss="cross_entropy")["metrics"]["actor/loss"])
        client.optim_step(lr=1e-2)

    assert losses[-1] < 0.7 * losses[0]
    client.destroy()


def test_reference_log_probs_are_of_the_first_weights_whatever_was_trained(
    student: HTTPTrainServiceClient,
) -> None:
    batch = make_batch()
    before = student.compute_ref_log_prob(batch)["batch"]["ref_log_prob"]
    student.update_actor(batch)

    after = student.compute_ref_log_prob(batch)["batch"]["ref_log_prob"]

    assert torch.equal(before, after)
    assert not torch.equal(after, student.compute_log_prob(batch)["batch"]["old_log_probs"])
