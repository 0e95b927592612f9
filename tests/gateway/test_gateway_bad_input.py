"""Whatever is wrong with a request: a clear error with its own status, and nothing changed."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nexrl_contract.names import CHECKSUM_HEADER

from tests.helpers.gateway import (
    FRAME,
    B,
    Gateway,
    PlayedGroup,
    R,
    S,
    frame,
    json_tensors,
    refusal,
    tensors,
)
from tests.helpers.servers import wait_until

UPDATE = "/update_actor?identifier=student"


def nothing_changed(gateway: Gateway, group: PlayedGroup) -> None:
    assert group.waiting() == 0
    assert gateway.stored() == []
    assert gateway.get("/jobs").json() == {"jobs": []}


BAD_TENSORS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "missing input_ids": ("update_actor", {"input_ids": None}, "input_ids", "missing"),
    "missing advantages": ("update_actor", {"advantages": None}, "advantages", "missing"),
    "missing advantages in forward_backward": (
        "forward_backward",
        {"advantages": None},
        "advantages",
        "missing",
    ),
    "missing teacher": ("update_actor_with_distillation", {}, "teacher_log_probs", "missing"),
    "float ids": ("update_actor", {"input_ids": np.ones((B, S), np.float32)}, "input_ids", "F32"),
    "bool ids": ("compute_log_prob", {"input_ids": np.ones((B, S), np.bool_)}, "input_ids", "BOOL"),
    "true and false for advantages": (
        "update_actor",
        {"advantages": np.ones((B, R), np.bool_)},
        "advantages",
        "BOOL",
    ),
    "ids of one dimension": (
        "update_actor",
        {"input_ids": np.ones(S, np.int64)},
        "input_ids",
        f"[{S}]",
    ),
    "no rows": (
        "compute_log_prob",
        {"input_ids": np.ones((0, S), np.int64)},
        "input_ids",
        f"[0, {S}]",
    ),
    "ragged rows": (
        "update_actor",
        {"advantages": np.ones((B - 1, R), np.float32)},
        "advantages",
        f"[{B - 1}, {R}]",
    ),
    "ragged mask": (
        "update_actor",
        {"attention_mask": np.ones((B + 1, S), np.int64)},
        "attention_mask",
        f"[{B + 1}, {S}]",
    ),
    "narrow mask": (
        "update_actor",
        {"attention_mask": np.ones((B, R), np.int64)},
        "attention_mask",
        f"[{B}, {R}]",
    ),
    "R as long as S": (
        "compute_log_prob",
        {"responses": np.ones((B, S), np.int64)},
        "responses",
        f"[{B}, {S}]",
    ),
    "neither S nor R": (
        "update_actor",
        {"old_log_probs": np.ones((B, 5), np.float32)},
        "old_log_probs",
        f"[{B}, 5]",
    ),
    "a temperature per token": (
        "compute_log_prob",
        {"temperature": np.ones((B, R), np.float32)},
        "temperature",
        f"[{B}, {R}]",
    ),
    "log-probs per row": (
        "update_actor",
        {"old_log_probs": np.ones(B, np.float32)},
        "old_log_probs",
        f"[{B}]",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_bad_tensor_is_refused_from_the_header(
    name: str, gateway: Gateway, group: PlayedGroup
) -> None:
    """422 names the tensor, what was expected and what came, for frames and JSON alike."""
    operation, changes, tensor, actual = BAD_TENSORS[name]
    arrays = tensors(**changes)
    as_frame = gateway.post(f"/{operation}?identifier=student", data=frame(arrays), headers=FRAME)
    as_json = gateway.post(
        f"/{operation}?identifier=student", json={"tensors": json_tensors(arrays)}
    )
    for response in (as_frame, as_json):
        error = refusal(response, 422, "INVALID_TENSOR")
        assert (error["tensor"], error["actual"]) == (tensor, actual)
        assert error["expected"]
    nothing_changed(gateway, group)


def test_what_the_loss_needs_decides(
    gateway: Gateway, make_group: Callable[..., PlayedGroup]
) -> None:
    """advantages are needed by policy losses only, and are accepted as [B,S], [B,R] and [B]."""
    supervised = make_group("sft", actor={"policy_loss": "cross_entropy"})
    make_group("kl", actor={"use_kl_loss": True, "policy_loss": "reinforce"})
    bare = frame(tensors(advantages=None, old_log_probs=None))
    asynchronous = {**FRAME, "Prefer": "respond-async"}
    assert (
        gateway.post("/update_actor?identifier=sft", data=bare, headers=asynchronous).status_code
        == 202
    )
    supervised.run_next(result={})
    error = refusal(
        gateway.post("/update_actor?identifier=kl", data=bare, headers=FRAME), 422, "INVALID_TENSOR"
    )
    assert error["tensor"] == "advantages"
    other = frame(tensors(advantages=None), params={"loss": "cross_entropy"})
    assert (
        gateway.post(
            "/forward_backward?identifier=kl", data=other, headers=asynchronous
        ).status_code
        == 202
    )
    for shape in ((B, S), (B, R), (B,)):
        whole = tensors(
            advantages=np.ones(shape, np.float32), ref_log_prob=np.ones((B, S), np.float32)
        )
        response = gateway.post(
            "/update_actor?identifier=kl", data=frame(whole), headers=asynchronous
        )
        assert response.status_code == 202


BAD_FRAMES: dict[str, bytes] = {
    "truncated": frame()[:-1],
    "one byte more": frame() + b"x",
    "cut in the header": frame()[:20],
    "no length": b"abc",
    "empty": b"",
    "a header that claims too much": (1 << 40).to_bytes(8, "little") + b"{}",
    "a header that is not JSON": (4).to_bytes(8, "little") + b"nope",
    "a header that lies about a shape": frame().replace(b"[4,8]", b"[4,9]", 1),
    "of another version": frame(version=2),
    "with metadata that is no object": frame(metadata=[1]),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_malformed_frame_leaves_nothing(
    name: str, chunked: bool, gateway: Gateway, group: PlayedGroup
) -> None:
    """400 MALFORMED, and no byte of it stays in the store."""
    body = BAD_FRAMES[name]
    response = gateway.post(
        UPDATE, data=(piece for piece in [body[:40], body[40:]]) if chunked else body, headers=FRAME
    )
    refusal(response, 400, "MALFORMED")
    nothing_changed(gateway, group)


def test_a_connection_that_ends_in_the_body_leaves_nothing(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """A client that dies in the middle of its upload: no job, no file."""
    body = frame({"input_ids": np.zeros((B, 100_000), np.int64)})
    host, port = gateway.url.removeprefix("http://").split(":")
    lines = [
        "POST /compute_log_prob HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: {FRAME['Content-Type']}",
    ]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body[:-100_000])
        wait_until(gateway.stored, 5, "the upload")
    wait_until(lambda: gateway.stored() == [], 5, "the clean-up")
    nothing_changed(gateway, group)


BAD_JSON: dict[str, tuple[bytes, int, str]] = {
    "not JSON": (b"{", 400, "MALFORMED"),
    "not UTF-8": (b'{"a": "\xff"}', 400, "MALFORMED"),
    "not an object": (b"[1]", 400, "MALFORMED"),
    "a bare NaN": (b'{"metadata": {"temperature": NaN}}', 400, "MALFORMED"),
    "endless nesting": (b'{"a":' + b"[" * 100_000, 400, "MALFORMED"),
    "nesting that ends": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", 400, "MALFORMED"),
    "a million lists": (b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", 400, "MALFORMED"),
    "a million texts": (b'{"a":[' + b'"",' * 1_000_000 + b'""]}', 400, "MALFORMED"),
    "a million escapes": (b'{"a":"' + b"\\n" * 1_000_000 + b'"}', 400, "MALFORMED"),
    "a text that does not end": (b'{"a":"' + b"x" * 100_000, 400, "MALFORMED"),
    "a long key": (b'{"' + b"x" * 100_000 + b'":1}', 400, "MALFORMED"),
    "a key twice": (b'{"tensors": {}, "tensors": {}}', 400, "MALFORMED"),
    "a key twice, deep": (b'{"metadata": {"a": {"b": 1, "b": 1}}}', 400, "MALFORMED"),
    "a number beyond float64": (b'{"metadata": {"temperature": 1e400}}', 400, "MALFORMED"),
    "a whole number of many digits": (
        b'{"metadata": {"step": ' + b"1" * 100_000 + b"}}",
        400,
        "MALFORMED",
    ),
    "half a surrogate pair": (b'{"loss": "a\\ud800"}', 400, "MALFORMED"),
    "half a surrogate pair as a key": (b'{"a\\uDC00": 1}', 400, "MALFORMED"),
    "another encoding": ('{"tensors": {}}'.encode("utf-16"), 400, "MALFORMED"),
    "tensors that are no object": (b'{"tensors": 3}', 422, "INVALID_ARGUMENT"),
    "two names of one thing": (b'{"tensors": {}, "batch": {}}', 422, "INVALID_ARGUMENT"),
    "an unknown argument": (b'{"tensors": {}, "temprature": 1}', 422, "INVALID_ARGUMENT"),
    "another identifier": (b'{"tensors": {}, "identifier": "teacher"}', 422, "INVALID_ARGUMENT"),
    "an identifier that is a number": (
        b'{"tensors": {}, "identifier": 3}',
        422,
        "INVALID_ARGUMENT",
    ),
    "parts without a number": (
        b'{"payload": "00000000000000000000000000000000"}',
        422,
        "INVALID_ARGUMENT",
    ),
    "parts that never came": (
        b'{"payload": "00000000000000000000000000000000", "parts": 2}',
        422,
        "INVALID_ARGUMENT",
    ),
    "a payload id that is a path": (
        b'{"payload": "../../etc/passwd", "parts": 1}',
        422,
        "INVALID_ARGUMENT",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused(name: str, gateway: Gateway, group: PlayedGroup) -> None:
    """Syntax is 400, what it says is 422."""
    body, status, code = BAD_JSON[name]
    refusal(
        gateway.post(UPDATE, data=body, headers={"Content-Type": "application/json"}), status, code
    )
    nothing_changed(gateway, group)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "not base64!"},
        {"data": "AAAA"},
        {"dtype": "complex64"},
        {"shape": "4x8"},
        {"encoding": "hex"},
    ],
    ids=str,
)
def test_a_malformed_json_tensor_is_named(
    change: dict[str, Any], gateway: Gateway, group: PlayedGroup
) -> None:
    """400 MALFORMED with the tensor's name."""
    batch = json_tensors()
    batch["advantages"] |= change
    assert (
        refusal(gateway.post(UPDATE, json={"batch": batch}), 400, "MALFORMED")["tensor"]
        == "advantages"
    )
    nothing_changed(gateway, group)


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "under tensors"])
@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3, 4]],
        {"data": "BQAAAAAAAAA=", "shape": [1, 1], "dtype": "int64"},
        {"shape": [1, 1], "values": [5]},
    ],
    ids=["a nested list", "without its encoding", "of another form"],
)
def test_a_tensor_in_another_form_is_told_the_right_one(
    value: Any, flat: bool, gateway: Gateway, group: PlayedGroup
) -> None:
    """400 naming the tensor, with an example that is accepted as it stands."""
    batch = {"input_ids": value}
    error = refusal(
        gateway.post(UPDATE, json=batch if flat else {"tensors": batch}), 400, "MALFORMED"
    )
    assert error["tensor"] == "input_ids"
    shown = json.loads(error["message"][error["message"].index('{"tensors"') :])
    response = gateway.post(
        "/compute_log_prob?identifier=student", json=shown, headers={"Prefer": "respond-async"}
    )
    assert response.status_code == 202, response.text


def test_a_word_beside_a_batch_is_compared_with_all_that_may_stand_there(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """Not only with the operation's arguments."""
    sent = {"tensors": json_tensors(), "metdata": {"temperature": 0.5}}
    assert (
        refusal(gateway.post(UPDATE, json=sent), 422, "INVALID_ARGUMENT")["nearest"] == "metadata"
    )
    nothing_changed(gateway, group)


def test_a_body_over_the_limit_is_refused_before_it_is_read(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """413 from the length alone; a frame that only its header admits to be too large, too."""
    host, port = gateway.url.removeprefix("http://").split(":")
    head = (
        f"POST {UPDATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        f"{FRAME['Content-Type']}\r\nContent-Length: {1 << 40}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    entry = {"input_ids": {"dtype": "U8", "shape": [1 << 30, 4], "data_offsets": [0, 4 << 30]}}
    text = json.dumps(entry).encode()
    lie = (piece for piece in [len(text).to_bytes(8, "little") + text, b"\0" * 100])
    refusal(
        gateway.post("/compute_log_prob?identifier=student", data=lie, headers=FRAME),
        413,
        "TOO_LARGE",
    )
    nothing_changed(gateway, group)


def test_a_part_over_the_limit_is_refused_before_it_is_read(
    gateway: Gateway, group: PlayedGroup
) -> None:
    """413 from the length alone, also where the body would be taken straight from the
    connection."""
    host, port = gateway.url.removeprefix("http://").split(":")
    lines = [
        f"PUT /payloads/{'a' * 32}/parts/0 HTTP/1.1",
        "Host: localhost",
        f"{CHECKSUM_HEADER}: {'0' * 32}",
    ]
    head = "\r\n".join([*lines, f"Content-Length: {300 * 1024**2 + 1}", "", ""])
    with socket.create_connection((host, int(port)), timeout=5) as client:
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")
    nothing_changed(gateway, group)


def test_json_above_32_mib_names_the_frame(gateway: Gateway, group: PlayedGroup) -> None:
    """413 that says what to do instead, with and without a length."""
    body = b" " * (32 * 1024**2 + 1)
    for data in (body, (piece for piece in [body])):
        response = gateway.post(UPDATE, data=data, headers={"Content-Type": "application/json"})
        message = refusal(response, 413, "TOO_LARGE")["message"]
        assert "nexrl.frame" in message
        assert "nexrl_client" in message
    nothing_changed(gateway, group)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {},
    ],
    ids=["unknown type", "compressed", "no type"],
)
def test_an_unknown_form_is_415(
    headers: dict[str, str], gateway: Gateway, group: PlayedGroup
) -> None:
    """Only JSON and frames, as they are."""
    refusal(gateway.post(UPDATE, data=b"x" * 10, headers=headers), 415, "UNSUPPORTED_TYPE")
    refusal(
        gateway.post("/barrier?identifier=student", data=frame(), headers=FRAME),
        415,
        "UNSUPPORTED_TYPE",
    )
    nothing_changed(gateway, group)


BAD_ARGUMENTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "unknown, with the nearest": ("optim_step", {"gradclip": 1.0}, "gradclip", "INVALID_ARGUMENT"),
    "a negative rate": ("optim_step", {"lr": -1}, "lr", "INVALID_ARGUMENT"),
    "a rate that is not finite": ("optim_step", {"lr": "Infinity"}, "lr", "INVALID_ARGUMENT"),
    "a missing path": ("load_checkpoint", {}, "path", "INVALID_ARGUMENT"),
    "arguments of a barrier": ("barrier", {"x": 1}, "x", "INVALID_ARGUMENT"),
    "HDFS": (
        "save_checkpoint",
        {"local_path": "a", "hdfs_path": "hdfs://x/y"},
        "hdfs_path",
        "HDFS_NOT_CONFIGURED",
    ),
    "HDFS as the path": ("load_checkpoint", {"path": "hdfs://x/y"}, "path", "HDFS_NOT_CONFIGURED"),
    "outside the roots": (
        "save_checkpoint",
        {"local_path": "/etc/ckpt"},
        "local_path",
        "PATH_REFUSED",
    ),
    "out of the roots": ("load_checkpoint", {"path": "a/../../../etc"}, "path", "PATH_REFUSED"),
    "our own files": ("load_checkpoint", {"path": ".nexrl/payloads/x"}, "path", "PATH_REFUSED"),
    "a root itself": ("save_checkpoint", {"local_path": "."}, "local_path", "PATH_REFUSED"),
    "a zero byte": (
        "convert_checkpoint_to_huggingface",
        {"local_path": "a\0b"},
        "local_path",
        "PATH_REFUSED",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(name: str, gateway: Gateway, group: PlayedGroup) -> None:
    """422 with the key, and the nearest known one where there is one."""
    operation, params, key, code = BAD_ARGUMENTS[name]
    error = refusal(gateway.post(f"/{operation}?identifier=student", json=params), 422, code)
    assert error["key"] == key
    assert error.get("nearest") == ("grad_clip" if key == "gradclip" else None)
    nothing_changed(gateway, group)


def test_an_unknown_loss_is_named_with_the_nearest(gateway: Gateway, group: PlayedGroup) -> None:
    """422 before the batch is looked at."""
    response = gateway.post(
        "/forward_backward", data=frame(params={"loss": "cross_entropie"}), headers=FRAME
    )
    assert refusal(response, 422, "INVALID_ARGUMENT")["nearest"] == "cross_entropy"
    nothing_changed(gateway, group)


def test_links_out_of_the_roots_are_refused(gateway: Gateway, group: PlayedGroup) -> None:
    """A link on the way, or in the place itself, may not lead outside; one that stays inside is
    kept as it is."""
    for name, target in (
        ("way", "/etc"),
        ("private", gateway.data / ".nexrl"),
        ("v1", None),
        ("current", "v1"),
    ):
        place = gateway.data / name
        if target is None:
            place.mkdir(exist_ok=True)
        elif not place.is_symlink():
            place.symlink_to(target)
    for path in ("way/x", "way", "private/x", "private"):
        refusal(gateway.post("/load_checkpoint", json={"path": path}), 422, "PATH_REFUSED")
    nothing_changed(gateway, group)
    response = gateway.post(
        "/load_checkpoint", json={"path": "current"}, headers={"Prefer": "respond-async"}
    )
    assert response.status_code == 202
    assert group.run_next(result={}).params["path"] == str(gateway.data / "current")


def test_only_a_good_group_takes_operations(
    gateway: Gateway, make_group: Callable[..., PlayedGroup], group: PlayedGroup
) -> None:
    """404, 400, 409 and 503 by what the group is; all before a byte of the body is read."""
    post = gateway.post
    refusal(
        post("/update_actor?identifier=nobody", data=b"rubbish", headers=FRAME),
        404,
        "GROUP_NOT_FOUND",
    )
    refusal(post("/barrier?identifier=..%2Fx"), 404, "GROUP_NOT_FOUND")
    make_group("teacher", role="teacher")
    refusal(post("/barrier"), 400, "IDENTIFIER_REQUIRED")
    refusal(
        post("/update_actor?identifier=teacher", data=b"rubbish", headers=FRAME),
        409,
        "ROLE_UNSUPPORTED",
    )
    make_group("new", state="up", initialised=False)
    refusal(
        post("/compute_log_prob?identifier=new", data=b"rubbish", headers=FRAME),
        409,
        "GROUP_NOT_READY",
    )
    for state in ("placing", "starting", "destroyed"):
        make_group(state, state=state, initialised=False)
        error = refusal(post(f"/barrier?identifier={state}"), 409, "GROUP_NOT_READY")
        assert error["identifier"] == state
    make_group("broken", state="down", cause="rank 1 was killed")
    assert (
        refusal(post("/barrier?identifier=broken"), 503, "GROUP_DOWN")["cause"]
        == "rank 1 was killed"
    )
    make_group("again", state="starting")
    refusal(post("/barrier?identifier=again"), 503, "GROUP_DOWN")
    nothing_changed(gateway, group)


def test_no_group_at_all(gateway: Gateway) -> None:
    """404 that says how to make one."""
    assert (
        "initialize_worker" in refusal(gateway.post("/barrier"), 404, "GROUP_NOT_FOUND")["message"]
    )


def test_unknown_routes_and_methods_have_the_same_body(gateway: Gateway) -> None:
    """404 and 405 are no exception, nor are arguments of the query."""
    refusal(gateway.get("/nothing"), 404, "NOT_FOUND")
    refusal(gateway.get("/update_actor"), 405, "METHOD_NOT_ALLOWED")
    assert refusal(gateway.get("/jobs?limit=x"), 422, "INVALID_ARGUMENT")["key"] == "limit"
    refusal(gateway.get("/jobs/0123?wait=31"), 422, "INVALID_ARGUMENT")
    refusal(gateway.get("/jobs/0123"), 404, "JOB_NOT_FOUND")
    refusal(gateway.get("/jobs/00000000000070000000000000000000/result"), 410, "EXPIRED")
    refusal(
        gateway.post("/barrier", headers={"Idempotency-Key": "no spaces"}), 422, "INVALID_ARGUMENT"
    )


def test_too_many_queued_is_429(gateway: Gateway, group: PlayedGroup) -> None:
    """The 65th waiting operation is refused with Retry-After, and its batch is taken away again."""
    for _ in range(64):
        assert gateway.post("/barrier", headers={"Prefer": "respond-async"}).status_code == 202
    refusal(gateway.post(UPDATE, data=frame(), headers=FRAME), 429, "TOO_MANY_QUEUED")
    assert gateway.stored() == []


def test_what_nobody_expected_says_nothing_internal(gateway: Gateway, group: PlayedGroup) -> None:
    """500 INTERNAL without a trace of the cause, which is in the log."""
    group.ledger.client.hset(f"nexrl:group:{group.identifier}", "world_size", '"a secret"')
    response = gateway.post("/barrier?identifier=student")
    error = refusal(response, 500, "INTERNAL")
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert error["message"]
    wait_until(lambda: "ValidationError" in gateway.log.read_text(), 5, "the traceback")


def test_numbers_that_json_does_not_have_are_strings(gateway: Gateway, group: PlayedGroup) -> None:
    """NaN and infinities in metrics come as text, never as null."""
    with group.working(
        lambda job: {"result": {"metrics": {"loss": math.nan, "peak": [math.inf, -math.inf, 1.5]}}}
    ):
        answer = gateway.post(UPDATE, data=frame(), headers=FRAME)
    assert answer.json()["metrics"] == {"loss": "NaN", "peak": ["Infinity", "-Infinity", 1.5]}
