"""The OpenAPI page tells the truth: its answers and errors are compared with those of the gateway
it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import xxhash
from nexrl_contract import names
from nexrl_contract.errors import ERRORS
from nexrl_contract.operations import OPERATIONS
from nexrl_contract.records import ProcessRecord, Share
from nexrl_gateway.openapi import ANSWERS
from nexrl_gateway.responses import ErrorBody, JobView
from nexrl_ledger import Ledger
from tensor_codec import from_json

from tests.helpers.gateway import ASYNC, FRAME, PAYLOAD, Gateway, PlayedGroup, frame, keys_of

Spec = dict[str, dict[str, dict[str, Any]]]
OLD_JOB = "019a0c3f5d207c1f8e2a4b6d8f0a1c3e"
"""Older than the records that are kept."""


@pytest.fixture
def paths(gateway: Gateway) -> Spec:
    """What /openapi.json says, by path and method."""
    spec: Spec = gateway.get("/openapi.json").json()["paths"]
    return spec


def example(paths: Spec, path: str, method: str = "post", status: str = "200") -> Any:
    return paths[path][method]["responses"][status]["content"]["application/json"]["example"]


def test_every_answer_and_error_is_declared_with_an_example(paths: Spec) -> None:
    """Of the status it stands under, in the service's own shape; /metrics alone is text."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            for status, response in operation["responses"].items():
                where = f"{method} {path} {status}"
                kind = "text/plain" if (path, status) == ("/metrics", "200") else "application/json"
                shown = response["content"][kind]
                shown = shown.get("examples") or {"": {"value": shown["example"]}}
                assert shown, where
                assert "HTTPValidationError" not in json.dumps(response), where
                for code, item in shown.items():
                    if int(status) >= 400 and path not in ("/health", "/ready"):
                        assert item["value"]["error"]["code"] == code, where
                        assert ERRORS[code].status == int(status), where
                assert ("Retry-After" in response.get("headers", {})) == (
                    status in ("429", "503")
                ), where


def test_frames_are_declared_where_they_can_be_had(
    gateway: Gateway, group: PlayedGroup, paths: Spec
) -> None:
    """Beside JSON, for the operations on a batch and for a job's result, and nowhere else."""
    declared = {path for path in paths for method in paths[path] if has_frame(paths[path][method])}
    assert declared == {f"/{name}" for name in OPERATIONS if OPERATIONS[name].takes_batch} | {
        "/jobs/{job_id}/result"
    }
    accept = {"Accept": names.FRAME_TYPE}
    with group.working(lambda job: {"tensors": {"old_log_probs": np.zeros((4, 3), np.float32)}}):
        answer = gateway.post("/compute_log_prob", data=frame(), headers={**FRAME, **accept})
    job_id = gateway.get("/jobs").json()["jobs"][0]["id"]
    for response in (answer, gateway.get(f"/jobs/{job_id}/result", headers=accept)):
        assert response.headers["Content-Type"] == names.FRAME_TYPE


def has_frame(operation: dict[str, Any]) -> bool:
    return names.FRAME_TYPE in operation["responses"]["200"]["content"]


@pytest.mark.parametrize("name", [name for name, row in OPERATIONS.items() if row.by_ranks])
def test_an_operations_answer_is_as_shown(
    name: str, gateway: Gateway, make_group: Callable[..., PlayedGroup], paths: Spec
) -> None:
    """Where the ranks say what the example says of them, the answer has the example's keys, and a
    202 has the job's."""
    operation, shown = OPERATIONS[name], example(paths, f"/{name}")
    group = make_group(role=operation.roles[0])
    sent = paths[f"/{name}"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    request = sent["tensors" if operation.takes_batch else "typical"]["value"]
    accepted = gateway.post(f"/{name}", json=request, headers=ASYNC)
    assert accepted.status_code == 202
    assert keys_of(accepted.json()) == keys_of(example(paths, f"/{name}", status="202"))
    assert {"Location", "Preference-Applied"} <= accepted.headers.keys()
    group.run_next(**said_by_the_ranks(shown, operation.takes_batch))
    answer = gateway.get(f"{accepted.headers['Location']}/result")
    assert keys_of(answer.json()) == keys_of(shown)
    ANSWERS[name].model_validate_json(answer.text, strict=True)
    JobView.model_validate_json(accepted.text, strict=True)
    views = gateway.get("/jobs").json()
    assert keys_of(views) == keys_of(example(paths, "/jobs", "get"))
    assert keys_of(views["jobs"][0]) == keys_of(example(paths, "/jobs/{job_id}", "get"))


def said_by_the_ranks(shown: dict[str, Any], with_batch: bool) -> dict[str, Any]:
    """The part of an example that is not the gateway's, as arguments of PlayedGroup.end()."""
    if not with_batch:
        return {
            "result": {key: shown[key] for key in shown.keys() - {"status", "identifier", "job_id"}}
        }
    meta_info = {
        key: shown["meta_info"][key] for key in shown["meta_info"].keys() - {"metrics", "job_id"}
    }
    tensors = {name: from_json(value) for name, value in shown["batch"].items()}
    return {"tensors": tensors, "result": {"metrics": shown["metrics"], "meta_info": meta_info}}


def test_what_is_shown_of_the_service_is_as_shown(
    gateway: Gateway, ledger: Ledger, group: PlayedGroup, paths: Spec
) -> None:
    """Health, models, jobs and parts: the keys of the examples are those of real answers."""
    ledger.checkpointers.beat(ProcessRecord(name="local-1", slots=1, free=1))
    for path in ("/health", "/ready", "/get_models"):
        assert keys_of(gateway.get(path).json()) == keys_of(example(paths, path, "get")), path
    info = gateway.get("/worker_info").json()
    assert info.keys() == example(paths, "/worker_info", "get").keys()
    assert example(paths, "/worker_info", "get")["config"].keys() <= info["config"].keys()
    job_id = gateway.post("/barrier", headers=ASYNC).json()["id"]
    cancelled = gateway.call("DELETE", f"/jobs/{job_id}").json()
    assert keys_of(cancelled) == keys_of(example(paths, "/jobs/{job_id}", "delete"))
    checksum = {names.CHECKSUM_HEADER: xxhash.xxh3_128_hexdigest(b"x")}
    part = gateway.call("PUT", f"/payloads/{PAYLOAD}/parts/0", data=b"x", headers=checksum).json()
    assert keys_of(part) == keys_of(example(paths, "/payloads/{payload_id}/parts/{part}", "put"))
    uploaded = gateway.get(f"/payloads/{PAYLOAD}").json()
    assert keys_of(uploaded) == keys_of(example(paths, "/payloads/{payload_id}", "get"))
    text = paths["/metrics"]["get"]["responses"]["200"]["content"]["text/plain"]["example"]
    real = gateway.get("/metrics")
    assert real.headers["Content-Type"].startswith("text/plain")
    assert {line for line in text.splitlines() if line.startswith("#")} <= set(
        real.text.splitlines()
    )


def test_a_new_groups_answer_is_as_shown(
    gateway: Gateway, ledger: Ledger, tmp_path: Path, paths: Spec
) -> None:
    """The one that made the group, and the one that found it."""
    (tmp_path / "config.json").write_text("{}")
    sent = {"config_dict": {"actor": {"model": {"path": str(tmp_path)}}}, "world_size": 1}
    path = "/initialize?identifier=new"
    job_id = gateway.post(path, json=sent, headers=ASYNC).json()["id"]
    job = ledger.claim(names.AGENT_QUEUE)
    assert job is not None
    ledger.groups.update(
        "new",
        ledger.groups.start_epoch("new", [Share(agent="agent", slots=1, host="here")]),
        state="up",
    )
    ledger.finish(job, result={})
    shown = keys_of(example(paths, "/initialize"))
    assert keys_of(gateway.get(f"/jobs/{job_id}/result").json()) == shown
    assert keys_of(gateway.post(path, json=sent).json()) == shown


def provoke_400(gateway: Gateway) -> requests.Response:
    return gateway.post(
        "/update_actor?identifier=student", data=b"{", headers={"Content-Type": "application/json"}
    )


def provoke_shape(gateway: Gateway) -> requests.Response:
    batch = {
        "input_ids": np.ones((2, 4), np.int64),
        "responses": np.ones((2, 2), np.int64),
        "advantages": np.ones((2, 2), np.float32),
        "old_log_probs": np.ones((2, 3), np.float32),
    }
    return gateway.post("/update_actor?identifier=student", data=frame(batch), headers=FRAME)


def provoke_key(gateway: Gateway) -> requests.Response:
    headers = {"Idempotency-Key": "step-17-try", **ASYNC}
    gateway.post("/optim_step?identifier=student", headers=headers)
    return gateway.post("/barrier?identifier=student", headers=headers)


def provoke_queue(gateway: Gateway) -> requests.Response:
    for _ in range(64):
        gateway.post("/barrier?identifier=student", headers=ASYNC)
    return gateway.post("/barrier?identifier=student", headers=ASYNC)


def provoke_result(gateway: Gateway) -> requests.Response:
    job_id = gateway.post("/barrier?identifier=student", headers=ASYNC).json()["id"]
    return gateway.get(f"/jobs/{job_id}/result")


def provoke_key_of_config(gateway: Gateway) -> requests.Response:
    config = {"actor": {"model": {"path": "/models/tiny"}, "lr": 1e-3}}
    return gateway.post("/initialize?identifier=new", json={"config_dict": config, "world_size": 1})


PROVOKED: dict[str, Callable[[Gateway], requests.Response]] = {
    "MALFORMED": provoke_400,
    "IDENTIFIER_REQUIRED": lambda gateway: gateway.post("/barrier"),
    "GROUP_NOT_FOUND": lambda gateway: gateway.post("/barrier?identifier=studnet"),
    "JOB_NOT_FOUND": lambda gateway: gateway.get(f"/jobs/{'f' * 12}7{'0' * 19}"),
    "GROUP_NOT_READY": lambda gateway: gateway.post(
        "/update_actor?identifier=bare", data=frame(), headers=FRAME
    ),
    "IDEMPOTENCY_MISMATCH": provoke_key,
    "JOB_RUNNING": provoke_result,
    "EXPIRED": lambda gateway: gateway.get(f"/jobs/{OLD_JOB}"),
    "TOO_LARGE": lambda gateway: gateway.post(
        "/update_actor?identifier=student",
        data=b" " * 40_000_000,
        headers={"Content-Type": "application/json"},
    ),
    "UNSUPPORTED_TYPE": lambda gateway: gateway.post(
        "/update_actor?identifier=student", data=b"x", headers={"Content-Type": "text/plain"}
    ),
    "INVALID_TENSOR": provoke_shape,
    "INVALID_CONFIG": provoke_key_of_config,
    "INVALID_ARGUMENT": lambda gateway: gateway.post(
        "/optim_step?identifier=student", json={"gradclip": 1.0}
    ),
    "TOO_MANY_QUEUED": provoke_queue,
    "GROUP_DOWN": lambda gateway: gateway.post("/barrier?identifier=down"),
    "WAIT_LIMIT": lambda gateway: gateway.post("/barrier?identifier=student"),
}


@pytest.mark.parametrize("code", PROVOKED)
def test_an_error_is_as_shown(
    code: str, gateway: Gateway, make_group: Callable[..., PlayedGroup], paths: Spec
) -> None:
    """It stands under its status with its code and what that means, and has at least the fields
    shown, each of its type."""
    make_group("student")
    make_group("teacher", role="teacher")
    if code == "GROUP_NOT_READY":
        make_group("bare", state="up")
    if code == "GROUP_DOWN":
        make_group("down", state="down", cause="rank 1 was killed")
    declared = paths["/update_actor"]["post"]["responses"][str(ERRORS[code].status)]
    shown = declared["content"]["application/json"]["examples"][code]["value"]["error"]
    response = PROVOKED[code](gateway)
    assert response.status_code == ERRORS[code].status
    error = ErrorBody.model_validate_json(response.text, strict=True).error
    assert shown["code"] == error.code == code
    assert shown["message"] == ERRORS[code].meaning
    assert f"{code}: {ERRORS[code].meaning}" in declared["description"]
    assert shown.keys() <= response.json()["error"].keys()
