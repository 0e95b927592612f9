"""Jobs: asked for twice they run once, asked for asynchronously they can be followed, and one group
never waits for another."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import pytest
import requests
import torch
from nexrl_client import HTTPTrainServiceClient, RoleUnsupported, ServiceTimeout, tensor_to_data

from tests.helpers.servers import wait_until
from tests.helpers.service import StartGroup, fingerprint, make_batch
from tests.helpers.stack import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def json_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "tensors": {k: tensor_to_data(v) for k, v in batch["tensors"].items()},
        "metadata": batch["metadata"],
    }


def test_a_retried_update_trains_once(student: HTTPTrainServiceClient, stack: Stack) -> None:
    """The same key five times, at once and after the end, moves the weights as far as one call
    does."""
    student.save_checkpoint("jobs/start", remove_previous_ckpt=False)
    student.update_actor(make_batch(seed=21))
    once = fingerprint(student)
    student.load_checkpoint("jobs/start")
    body, key = json_batch(make_batch(seed=21)), uuid.uuid4().hex
    answers: list[requests.Response] = []

    def post() -> None:
        headers = {"Idempotency-Key": key}
        answers.append(
            requests.post(
                f"{stack.url}/update_actor?identifier=student",
                json=body,
                headers=headers,
                timeout=60,
            )
        )

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    post()

    assert [answer.status_code for answer in answers] == [200] * 5
    assert len({answer.json()["meta_info"]["job_id"] for answer in answers}) == 1
    assert fingerprint(student) == once


def test_one_key_for_other_content_is_refused_and_trains_nothing(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    url = f"{stack.url}/update_actor?identifier=student"
    first = requests.post(url, json=json_batch(make_batch(seed=1)), headers=headers, timeout=60)
    before = fingerprint(student)

    second = requests.post(url, json=json_batch(make_batch(seed=2)), headers=headers, timeout=60)

    assert (first.status_code, second.status_code) == (200, 409)
    assert second.json()["error"]["code"] == "IDEMPOTENCY_MISMATCH"
    assert fingerprint(student) == before


def test_an_asynchronous_request_can_be_followed_to_its_result(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    body = json_batch(make_batch())
    url = f"{stack.url}/compute_log_prob?identifier=student"

    accepted = requests.post(url, json=body, headers={"Prefer": "respond-async"}, timeout=60)
    view = requests.get(f"{stack.url}{accepted.headers['Location']}?wait=30", timeout=60).json()
    result = requests.get(f"{stack.url}{view['result_url']}", timeout=60).json()
    direct = requests.post(url, json=body, timeout=60).json()

    assert accepted.status_code == 202
    assert view["state"] == "finished"
    assert result["batch"] == direct["batch"]


def test_a_timeout_names_the_job_which_goes_on(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    impatient = HTTPTrainServiceClient(stack.url, "student")
    impatient.request_timeout = 0.001
    for _ in range(3):  # the group is busy, however quick it is
        student.submit("compute_log_prob", make_batch(rows=64, length=64, responses=32))

    with pytest.raises(ServiceTimeout) as caught:
        impatient.compute_log_prob(make_batch(rows=64, length=64, responses=32))

    job = caught.value.job
    assert job.id in str(caught.value)
    assert job.result(60)["batch"]["old_log_probs"].shape == (64, 32)


def test_a_queued_operation_says_why_it_waits_and_can_be_cancelled(
    student: HTTPTrainServiceClient, stack: Stack
) -> None:
    slow = student.submit("compute_log_prob", make_batch(rows=256, length=256, responses=128))
    queued = student.submit("update_actor", make_batch())
    before = requests.get(f"{stack.url}/jobs/{queued.id}", timeout=10).json()

    queued.cancel()

    assert before["state"] == "queued"
    assert "ahead of it" in before["waits_for"]
    assert queued.status()["state"] == "cancelled"
    assert slow.result(60)["batch"]["old_log_probs"].shape == (256, 128)


def test_a_student_and_a_teacher_work_side_by_side(
    student: HTTPTrainServiceClient, start_group: StartGroup
) -> None:
    """Two groups on one stack: the teacher answers while the student is busy, and has no step to
    take."""
    teacher = start_group("teacher", role="teacher")
    batch = make_batch()
    busy = student.submit("compute_log_prob", make_batch(rows=512, length=256, responses=128))
    wait_until(lambda: busy.status()["state"] == "running", 10, "the student's beginning")
    started = time.monotonic()
    scores = teacher.compute_log_prob(batch)["batch"]["old_log_probs"]
    waited = time.monotonic() - started
    student_was_busy = busy.status()["state"] == "running"
    batch["tensors"]["teacher_log_probs"] = scores
    learned = student.update_actor_with_distillation(batch)["metrics"]

    assert student_was_busy, (
        f"the teacher answered after {waited:.1f} s, when the student had ended"
    )
    assert learned["step_applied"] is True
    with pytest.raises(RoleUnsupported):
        teacher.update_actor(batch)
    busy.result(120)
    teacher.destroy()


def test_json_and_frame_give_the_same_answer(student: HTTPTrainServiceClient, stack: Stack) -> None:
    batch = make_batch(seed=8)
    frame = student.compute_log_prob(batch)["batch"]["old_log_probs"]

    answer = requests.post(
        f"{stack.url}/compute_log_prob?identifier=student", json=json_batch(batch), timeout=60
    ).json()

    from nexrl_client import data_to_tensor

    assert torch.equal(frame, data_to_tensor(answer["batch"]["old_log_probs"]))


def test_a_batch_in_parts_is_one_step(student: HTTPTrainServiceClient, stack: Stack) -> None:
    """A client with a small request limit uploads parts; they are one batch and one optimizer
    step."""
    in_parts = HTTPTrainServiceClient(stack.url, "student", max_request_bytes=1000)
    student.save_checkpoint("jobs/parts", remove_previous_ckpt=False)
    student.update_actor(make_batch(rows=16, seed=4))
    whole = fingerprint(student)
    student.load_checkpoint("jobs/parts")

    metrics = in_parts.update_actor(make_batch(rows=16, seed=4))["metrics"]

    assert metrics["actor/rows"] == 16
    assert fingerprint(student) == whole
