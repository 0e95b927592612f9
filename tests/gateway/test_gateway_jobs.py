"""From a request to its answer: synchronous, asynchronous, by key, as JSON and as a frame, in one
piece and in parts."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
import tensor_codec
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_ledger import Ledger

from tests.helpers.gateway import (
    ASYNC,
    FRAME,
    PAYLOAD,
    B,
    Gateway,
    PlayedGroup,
    R,
    frame,
    json_tensors,
    put_parts,
    refusal,
    tensors,
)
from tests.helpers.servers import wait_until

UPDATE = "/update_actor?identifier=student"


def waiting_call(call: Callable[[], requests.Response]) -> Callable[[], requests.Response]:
    """Start a call in the background; the returned function waits for its answer."""
    found: list[requests.Response] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()

    def answer() -> requests.Response:
        thread.join()
        return found[0]

    return answer


def test_a_synchronous_update_answers_when_it_is_done(gateway: Gateway, group: PlayedGroup) -> None:
    """Metrics stand in both places; the job's id, its times and what was ignored come along."""
    whole = tensors(returns=np.zeros((B, R), np.float32))
    answer = waiting_call(lambda: gateway.post(UPDATE, data=frame(whole), headers=FRAME))
    job = wait_until(group.claim, 5, "the job")
    assert (job.rows, job.params) == (B, {"explain": False})
    group.end(job, {"metrics": {"loss": 0.5}, "meta_info": {"timing": {"ranks_s": 0.25}}})
    got = answer().json()
    assert got["metrics"] == got["meta_info"]["metrics"] == {"loss": 0.5}
    assert got["batch"] == {}
    info = got["meta_info"]
    assert (info["job_id"], info["identifier"], info["operation"]) == (
        job.id,
        "student",
        "update_actor",
    )
    assert info["ignored"] == ["returns"]
    assert info["timing"]["ranks_s"] == 0.25
    assert info["timing"]["run_s"] >= 0
    assert info["timing"]["queued_s"] >= 0


def test_metadata_that_only_distillation_reads_is_named(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """In a frame, in JSON and in parts; distillation itself names nothing."""
    metadata = {"entropy_coeff": 0.1, "loss_agg_mode": "token-mean", "temperature": 1.0}
    sent = frame(metadata=metadata)
    parts = put_parts(gateway, sent, 100_000)
    gateway.post(UPDATE, data=sent, headers={**FRAME, **ASYNC})
    gateway.post(UPDATE, json={"batch": json_tensors(), "meta_info": metadata}, headers=ASYNC)
    gateway.post(UPDATE, json={"payload": PAYLOAD, "parts": parts}, headers=ASYNC)
    for _ in range(3):
        assert group.run_next().ignored == ["entropy_coeff", "loss_agg_mode"]
    taught = frame(
        tensors(teacher_log_probs=np.zeros((B, R), np.float32), advantages=None), metadata=metadata
    )
    gateway.post("/update_actor_with_distillation", data=taught, headers={**FRAME, **ASYNC})
    assert group.run_next().ignored == []


def test_tensors_come_back_as_json_or_as_a_frame(gateway: Gateway, group: PlayedGroup) -> None:
    """The same result in both forms, chosen by Accept; a frame carries metrics and job id in its
    header."""
    scores = np.arange(B * R, dtype=np.float32).reshape(B, R)
    scores[0, 0] = np.nan

    def post(**headers: str) -> requests.Response:
        return gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **headers})

    result = {"metrics": {"tokens": 12}, "meta_info": {"timing": {"ranks_s": 0.1}}}
    with group.working(lambda job: {"tensors": {"old_log_probs": scores}, "result": result}):
        as_json, as_frame = post(), post(Accept=names.FRAME_TYPE)
        again = gateway.get(
            f"/jobs/{as_json.json()['meta_info']['job_id']}/result",
            headers={"Accept": names.FRAME_TYPE},
        )
    entry = as_json.json()["batch"]["old_log_probs"]
    assert entry["dtype"] == "float32"
    assert base64.b64decode(entry["data"]) == scores.tobytes()
    assert as_json.json()["metrics"] == {"tokens": 12}
    for response in (as_frame, again):
        assert response.headers["Content-Type"] == names.FRAME_TYPE
        decoded = tensor_codec.wrap(response.content)
        np.testing.assert_array_equal(decoded.numpy("old_log_probs"), scores)
        document = json.loads(decoded.header.metadata["nexrl"])
        assert document["metrics"] == {"tokens": 12}
        assert set(document["meta_info"]) >= {"job_id", "timing", "ignored", "identifier"}


@pytest.mark.parametrize("seq", [None, 1])
def test_a_result_that_changed_in_the_store_is_refused(
    seq: int | None, gateway: Gateway, group: PlayedGroup
) -> None:
    """Before its answer begins; whether the operation may be called again depends on what it has
    done."""
    job_id = gateway.post(UPDATE, data=frame(), headers=FRAME | ASYNC).json()["id"]
    job = wait_until(group.claim, 5, "the job")
    group.end(job, tensors={"log_probs": np.zeros((B, R), np.float32)}, seq=seq)
    path = gateway.payloads / f"{job_id}.result"
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    error = refusal(
        gateway.get(f"/jobs/{job_id}/result", headers={"Accept": names.FRAME_TYPE}),
        500,
        "PAYLOAD_DAMAGED",
    )
    assert not error["retryable"]
    assert ("do not repeat it" if seq else "call it again") in error["message"]


def test_an_asynchronous_job_is_followed_by_its_url(gateway: Gateway, group: PlayedGroup) -> None:
    """202 with Location; the view says why it waits; a long poll returns as soon as it ends; the
    result is the same answer."""
    first = gateway.post("/barrier", headers=ASYNC)
    second = gateway.post(UPDATE, data=frame(), headers={**FRAME, **ASYNC})
    assert (first.status_code, second.status_code) == (202, 202)
    url = second.headers["Location"]
    assert url == f"/jobs/{second.json()['id']}"
    assert "1 operation ahead" in second.json()["waits_for"]
    error = refusal(gateway.get(f"{url}/result"), 409, "JOB_RUNNING")
    assert error["job_id"] == second.json()["id"]
    group.run_next(result={})
    view, _ = polled_to_its_end(gateway, group, url)
    assert (view["state"], view["operation"], view["attempt"], view["error"]) == (
        "finished",
        "update_actor",
        1,
        None,
    )
    assert gateway.get(view["result_url"]).json()["metrics"] == {"loss": 1.0}
    assert [job["id"] for job in gateway.get("/jobs?limit=1").json()["jobs"]] == [view["id"]]
    assert gateway.get("/jobs?identifier=teacher").json() == {"jobs": []}


def polled_to_its_end(
    gateway: Gateway, group: PlayedGroup, url: str
) -> tuple[dict[str, Any], float]:
    """What a long poll of the next job answers when that ends, and how many seconds later."""
    poll = waiting_call(lambda: gateway.get(f"{url}?wait=20"))
    time.sleep(0.1)
    started = time.monotonic()
    group.run_next(result={"metrics": {"loss": 1.0}})
    view: dict[str, Any] = poll().json()
    return view, time.monotonic() - started


def test_a_long_poll_is_woken_by_the_end_of_its_job(gateway: Gateway, group: PlayedGroup) -> None:
    """By a message: the re-read would come after 0.9 s at the earliest. The quickest of three, as
    machines are busy at times."""
    seconds = []
    for _ in range(3):
        url = gateway.post("/barrier", headers=ASYNC).headers["Location"]
        view, waited = polled_to_its_end(gateway, group, url)
        assert view["state"] == "finished"
        seconds.append(waited)
    assert min(seconds) < 0.6


def test_prefer_with_a_wait_answers_200_in_time(gateway: Gateway, group: PlayedGroup) -> None:
    """respond-async, wait=S: the result if it comes within S seconds, else 202."""
    slow = gateway.post("/barrier", headers={"Prefer": "respond-async, wait=1"})
    assert slow.status_code == 202
    with group.working(lambda job: {"result": {"note": "done"}}):
        quick = gateway.post("/barrier", headers={"Prefer": 'wait="10", Respond-Async'})
    assert (quick.status_code, quick.json()["status"], quick.json()["note"]) == (
        200,
        "success",
        "done",
    )


def test_the_wait_limit_names_the_job_which_goes_on(gateway: Gateway, group: PlayedGroup) -> None:
    """504 with the job's id after NEXRL_WAIT_LIMIT_S; the job can still end well."""
    error = refusal(gateway.post("/barrier?identifier=student"), 504, "WAIT_LIMIT")
    group.run_next(result={})
    assert gateway.get(f"/jobs/{error['job_id']}").json()["state"] == "finished"


def test_a_client_that_leaves_does_not_cancel_its_job(gateway: Gateway, group: PlayedGroup) -> None:
    """Whoever waits may go; the job stays."""
    with pytest.raises(requests.Timeout):
        requests.post(f"{gateway.url}/barrier", timeout=0.3)
    job = wait_until(group.claim, 5, "the job")
    group.end(job, {})
    assert gateway.get(f"/jobs/{job.id}").json()["state"] == "finished"


def test_a_failed_job_answers_with_its_own_status(gateway: Gateway, group: PlayedGroup) -> None:
    """The ranks' error, synchronously and over /jobs/{id}/result, with identifier, job and rank."""
    bad = ServiceError(
        "INVALID_VALUE", "advantages holds nan in row 2", tensor="advantages", row=2
    ).body()
    lost = ServiceError("OPERATION_FAILED", "out of memory", rank=1).body()
    for body, status, code in ((bad, 422, "INVALID_VALUE"), (lost, 500, "OPERATION_FAILED")):
        with group.working(lambda job, body=body: {"error": body}):  # type: ignore[misc]
            error = refusal(gateway.post(UPDATE, data=frame(), headers=FRAME), status, code)
        assert error["identifier"] == "student"
        assert (error.get("row"), error["rank"]) == (body.get("row"), body["rank"])
        assert refusal(gateway.get(f"/jobs/{error['job_id']}/result"), status, code) == error
        assert gateway.get(f"/jobs/{error['job_id']}").json()["state"] == "failed"


def test_cancelling_takes_a_queued_job_and_its_batch_away(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """A running job is 409, an ended one too; whoever waits for a cancelled one gets an error."""
    running = gateway.post(UPDATE, data=frame(), headers={**FRAME, **ASYNC}).json()["id"]
    job = group.claim()
    assert job is not None
    queued = gateway.post(UPDATE, data=frame(), headers={**FRAME, **ASYNC}).json()["id"]
    assert gateway.stored() == sorted([running, queued])
    assert gateway.call("DELETE", f"/jobs/{queued}").json()["state"] == "cancelled"
    assert gateway.stored() == [running]
    refusal(gateway.get(f"/jobs/{queued}/result"), 409, "JOB_CANCELLED")
    refusal(gateway.call("DELETE", f"/jobs/{running}"), 409, "JOB_RUNNING")
    group.end(job, {})
    refusal(gateway.call("DELETE", f"/jobs/{running}"), 409, "JOB_FINAL")
    refusal(gateway.call("DELETE", "/jobs/nothing"), 404, "JOB_NOT_FOUND")


def test_a_rolled_back_job_says_so(gateway: Gateway, group: PlayedGroup) -> None:
    """Its effect is not in the weights, so its result is an error."""
    job_id = gateway.post("/optim_step", headers=ASYNC).json()["id"]
    group.run_next(result={})
    group.ledger.client.hset(names.job_key(job_id), "state", "rolled_back")
    refusal(gateway.get(f"/jobs/{job_id}/result"), 409, "JOB_ROLLED_BACK")


def test_an_expired_result_is_410(gateway: Gateway, group: PlayedGroup) -> None:
    """The record may outlive the tensors."""
    job_id = gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **ASYNC}).json()[
        "id"
    ]
    group.run_next(tensors={"old_log_probs": np.zeros((B, R), np.float32)})
    group.store.delete(f"{job_id}.result")
    refusal(gateway.get(f"/jobs/{job_id}/result"), 410, "EXPIRED")


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "frame": lambda: {"data": frame(metadata={"temperature": 0.7}), "headers": FRAME},
    "tensors": lambda: {"json": {"tensors": json_tensors(), "metadata": {"temperature": 0.7}}},
    "batch": lambda: {
        "json": {
            "batch": json_tensors(),
            "meta_info": {"temperature": 0.7},
            "identifier": "student",
        }
    },
    "flat": lambda: {"json": {**json_tensors(), "metadata": {"temperature": 0.7}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch_is_stored_as_the_same_bytes(
    form: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """What the ranks read does not depend on how it travelled."""
    job_id = gateway.post("/update_actor", **_with(FORMS[form](), ASYNC)).json()["id"]
    assert (gateway.payloads / job_id).read_bytes() == frame(metadata={"temperature": 0.7})


def test_a_key_makes_two_requests_one_job(gateway: Gateway, group: PlayedGroup) -> None:
    """Same content: the first job and its answer, and no second payload; other content: 409; other
    operation: 409."""
    headers = {**FRAME, "Idempotency-Key": "step-1"}
    first = gateway.post(UPDATE, data=frame(), headers={**headers, **ASYNC}).json()["id"]
    again = gateway.post(UPDATE, data=frame(), headers={**headers, **ASYNC}).json()["id"]
    assert again == first
    assert gateway.stored() == [first]
    other = frame(tensors(advantages=np.zeros((B, R), np.float32)))
    error = refusal(gateway.post(UPDATE, data=other, headers=headers), 409, "IDEMPOTENCY_MISMATCH")
    assert error["job_id"] == first
    refusal(
        gateway.post("/compute_log_prob", data=frame(), headers=headers),
        409,
        "IDEMPOTENCY_MISMATCH",
    )
    assert gateway.stored() == [first]
    assert group.waiting() == 1


def test_a_key_answers_also_when_the_group_has_gone(gateway: Gateway, group: PlayedGroup) -> None:
    """A client that lost its answer gets it, whatever has become of the group since."""
    headers = {**FRAME, "Idempotency-Key": "last-step"}
    with group.working(lambda job: {"result": {"metrics": {"loss": 2.0}}}):
        first = gateway.post(UPDATE, data=frame(), headers=headers).json()
    group.ledger.groups.mark_down("student", 1, "rank 0 was killed")
    assert gateway.post(UPDATE, data=frame(), headers=headers).json() == first
    refusal(
        gateway.post(UPDATE, data=frame(), headers={**headers, "Idempotency-Key": "next"}),
        503,
        "GROUP_DOWN",
    )
    assert gateway.stored() == []


def test_the_same_key_at_the_same_time_is_one_job(gateway: Gateway, group: PlayedGroup) -> None:
    """Eight clients, one key: one job, one payload, one answer."""
    headers = {**FRAME, **ASYNC, "Idempotency-Key": "all-at-once"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: gateway.post(UPDATE, data=frame(), headers=headers).json()["id"], range(8)
            )
        )
    assert len(set(answers)) == 1
    assert gateway.stored() == [answers[0]]
    assert group.waiting() == 1


def test_paths_are_made_absolute(gateway: Gateway, group: PlayedGroup) -> None:
    """A relative path means one below the data folder; all arguments reach the ranks with their
    defaults."""
    gateway.post(
        "/save_checkpoint", json={"local_path": "ckpt/step_1", "global_step": 1}, headers=ASYNC
    )
    job = group.run_next(result={})
    assert job.params == {
        "local_path": str(gateway.data / "ckpt" / "step_1"),
        "hdfs_path": None,
        "global_step": 1,
        "saved_fully_shared_ckpt": True,
        "save_weight_only": False,
        "remove_previous_ckpt": True,
    }


def test_a_large_non_tensor_result_comes_from_the_store(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """Whatever the ranks put there instead of into the record."""
    with group.working(
        lambda job: {"tensors": {}, "result": {"metrics": {"losses": [0.5] * 2000}}}
    ):
        assert gateway.post("/optim_step").json()["metrics"]["losses"] == [0.5] * 2000
        assert (
            len(gateway.post(UPDATE, data=frame(), headers=FRAME).json()["metrics"]["losses"])
            == 2000
        )


def test_records_stay_small(gateway: Gateway, ledger: Ledger, group: PlayedGroup) -> None:
    """Hundreds of names that nobody reads do not end up in Redis."""
    many = {f"extra_{index}": np.zeros(1, np.float32) for index in range(400)}
    job_id = gateway.post(UPDATE, data=frame(tensors(**many)), headers={**FRAME, **ASYNC}).json()[
        "id"
    ]
    record = ledger.client.hgetall(names.job_key(job_id))
    assert sum(len(name) + len(value) for name, value in record.items()) < 2048
    assert "more" in ledger.require_job(job_id).ignored[-1]


def _with(options: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
    return {**options, "headers": {**options.get("headers", {}), **headers}}
