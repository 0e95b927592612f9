"""One call over a real socket: how many round trips, what is in them, and what parts of it are
shared."""

from __future__ import annotations

import pickle
import re
import socket
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import tensor_codec
import xxhash
from nexrl_client import ClientClosed, HTTPTrainServiceClient, InvalidAnswer, TooLarge, Unreachable
from nexrl_contract.names import CHECKSUM_HEADER, FRAME_TYPE, REQUEST_ID_HEADER

from tests.helpers.scripted_server import Reply, ScriptedServer, error_reply, frame_reply

JOB = "0123456789ab7aaaaaaaaaaaaaaaaaaa"
QUEUED = Reply(
    202,
    {"id": JOB, "operation": "compute_log_prob", "state": "queued"},
    {"Location": f"/jobs/{JOB}"},
)


def test_quick_call_is_one_round_trip(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any]
) -> None:
    """A job that ends while the service holds the answer back costs one request, with the batch as
    a frame."""
    values = np.ones((4, 3), np.float32)
    server.script = [frame_reply({"old_log_probs": values}, {"x": 1}, {"job_id": JOB})]
    client.request_timeout = 200
    assert np.array_equal(client.compute_log_prob(batch)["batch"]["old_log_probs"], values)
    (request,) = server.seen
    assert (request.method, request.path, request.query) == (
        "POST",
        "/compute_log_prob",
        {"identifier": "student"},
    )
    assert request.headers["content-type"] == FRAME_TYPE
    assert FRAME_TYPE in request.headers["accept"]
    assert request.headers["prefer"] == "respond-async, wait=25"
    assert request.headers["accept-encoding"] == "identity"
    assert len(request.headers["idempotency-key"]) == 32
    assert np.array_equal(
        tensor_codec.wrap(request.content).numpy("input_ids"), batch["tensors"]["input_ids"]
    )


def test_long_call_polls_for_the_result(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any]
) -> None:
    """A job that takes longer is asked for by its id until it is done, without sending the batch
    again."""
    running = error_reply("JOB_RUNNING", job_id=JOB)
    server.script = [QUEUED, running, running, frame_reply({}, {"x": "NaN"}, {})]
    result = client.update_actor(batch)
    assert result["metrics"]["x"] != result["metrics"]["x"]
    assert [request.path for request in server.seen] == ["/update_actor"] + [
        f"/jobs/{JOB}/result"
    ] * 3
    assert all(0 < float(request.query["wait"]) <= 25 for request in server.seen[1:])
    assert result["meta_info"]["ignored"] == ["prompts", "uid"]


def test_keys_differ_between_calls(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """Each call is one of its own, even with equal content."""
    client.barrier()
    client.barrier()
    assert len({request.headers["idempotency-key"] for request in server.seen}) == 2


def test_submit_and_handle(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any]
) -> None:
    """submit returns at once with a handle that knows state and result, and can cancel."""
    view = {"id": JOB, "operation": "compute_log_prob", "state": "running"}
    server.script = [
        QUEUED,
        Reply(content=view),
        Reply(content=view | {"state": "finished"}),
        frame_reply({"old_log_probs": np.zeros((4, 3), np.float32)}, {}, {}),
        Reply(content=view | {"state": "cancelled"}),
    ]
    job = client.submit("compute_log_prob", batch)
    assert server.seen[0].headers["prefer"] == "respond-async"
    assert (job.id, job.operation) == (JOB, "compute_log_prob")
    assert job.status() == view
    assert job.done()
    assert job.result(timeout=5)["batch"]["old_log_probs"].shape == (4, 3)
    assert job.cancel()["state"] == "cancelled"
    assert [f"{request.method} {request.path}" for request in server.seen[1:]] == [
        f"GET /jobs/{JOB}",
        f"GET /jobs/{JOB}",
        f"GET /jobs/{JOB}/result",
        f"DELETE /jobs/{JOB}",
    ]


def test_submit_of_what_is_done_already(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """Where the service answers a submit with a result, the handle is of the job that it names."""
    server.script = [Reply(content={"status": "success", "already": True, "job_id": JOB})]
    assert client.submit("initialize_worker", config_dict={"actor": {}}).id == JOB


def test_questions(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """The questions go to their paths, for the client's group where they are about one."""
    server.script = [
        Reply(content={"identifiers": ["student"], "count": 1}),
        Reply(content={"identifier": "student"}),
        Reply(content={"jobs": [{"id": JOB}]}),
        Reply(content={"id": JOB, "operation": "barrier", "state": "running"}),
    ]
    assert client.get_models()["count"] == 1
    assert client.worker_info()["identifier"] == "student"
    assert client.jobs(limit=3) == [{"id": JOB}]
    assert client.job(JOB).operation == "barrier"
    assert [(request.path, request.query) for request in server.seen] == [
        ("/get_models", {}),
        ("/worker_info", {"identifier": "student"}),
        ("/jobs", {"identifier": "student", "limit": "3"}),
        (f"/jobs/{JOB}", {}),
    ]


def test_arguments_travel_by_name(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """JSON bodies have the methods' argument names, defaults included."""
    client.save_checkpoint("ckpt/1", global_step=1)
    client.optim_step(lr=1e-3)
    assert server.seen[0].json() == {
        "local_path": "ckpt/1",
        "hdfs_path": None,
        "global_step": 1,
        "saved_fully_shared_ckpt": True,
        "save_weight_only": False,
        "remove_previous_ckpt": True,
    }
    assert server.seen[1].json() == {"lr": 1e-3, "grad_clip": None, "discard": False}


def test_health_is_told_as_it_is(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """A degraded service is an answer, not an error; it is asked once."""
    server.script = [
        Reply(503, {"status": "degraded", "redis": False}),
        Reply(404, {"error": {"code": "NOT_FOUND"}}),
    ]
    assert client.health_check()["status"] == "degraded"
    with pytest.raises(Exception, match="NOT_FOUND"):
        client.health_check()
    server.script = [Reply(content={"hello": "world"})]
    with pytest.raises(InvalidAnswer):
        client.health_check()


def test_large_batches_travel_in_parts(server: ScriptedServer) -> None:
    """Above max_request_bytes the frame is put in parts with checksums, then run as one
    operation."""
    server.script = [Reply()] * 4 + [frame_reply({}, {}, {})]
    client = HTTPTrainServiceClient(server.url, "student", max_request_bytes=1_000_000)
    ids = np.arange(400_000).reshape(4, -1)
    client.forward_backward({"input_ids": ids}, loss="cross_entropy")
    *parts, verb = server.seen
    payload = parts[0].path.split("/")[2]
    assert [part.path for part in parts] == [
        f"/payloads/{payload}/parts/{number}" for number in range(4)
    ]
    assert {part.method for part in parts} == {"PUT"}
    assert max(len(part.content) for part in parts) == 1_000_000
    assert all(
        part.headers[CHECKSUM_HEADER.lower()] == xxhash.xxh3_128(part.content).hexdigest()
        for part in parts
    )
    frame = tensor_codec.wrap(b"".join(part.content for part in parts))
    assert np.array_equal(frame.numpy("input_ids"), ids)
    assert (verb.path, verb.json()) == (
        "/forward_backward",
        {"loss": "cross_entropy", "payload": payload, "parts": 4},
    )


def test_progress_bar(server: ScriptedServer, capfd: pytest.CaptureFixture[str]) -> None:
    """progress=True shows the upload on standard error, once per batch; without it nothing is
    written."""
    server.script = [
        Reply(delay_s=0.2),
        Reply(429, b"", delay_s=0.2),
        Reply(delay_s=0.2),
        frame_reply({}, {}, {}),
    ]
    batch = {"input_ids": np.arange(200_000).reshape(4, -1)}
    with HTTPTrainServiceClient(server.url, progress=True, max_request_bytes=1_000_000) as client:
        client.update_actor(batch)
        client.barrier()
    shown = capfd.readouterr().err
    assert "update_actor" in shown
    assert re.search(r"\b(62|65|100)%", shown)
    assert "barrier" not in shown
    with HTTPTrainServiceClient(server.url) as client:
        client.update_actor(batch)
    assert capfd.readouterr().err == ""


def test_connection_is_kept(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """Calls one after another use one connection."""
    for _ in range(5):
        client.barrier()
    assert server.connections == 1


def test_threads_share_a_client(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """Calls from several threads run side by side, each with its own answer."""
    server.script = [Reply(202, {"id": f"job{number}"}, delay_s=1.0) for number in range(4)] + [
        Reply()
    ]
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(client.submit("barrier").id)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == [f"job{number}" for number in range(4)]
    arrivals = [request.at for request in server.seen]
    assert max(arrivals) - min(arrivals) < 1.0  # all were there before the first was answered


def test_pickled_client_connects_anew(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """A client and a handle can be sent to another process."""
    server.script = [QUEUED, Reply()]
    job = client.submit("barrier")
    copy = pickle.loads(pickle.dumps(client))
    assert (copy.identifier, copy.request_timeout) == ("student", 10)
    assert copy.barrier()["status"] == "success"
    assert pickle.loads(pickle.dumps(job)).result()["status"] == "success"


def test_the_answer_of_another_request_is_never_returned(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any]
) -> None:
    """A connection that brought one is given up, and the call goes on over a new one; a result
    names its own job."""
    other = frame_reply({"old_log_probs": np.ones((4, 3), np.float32)}, {}, {})
    server.script = [
        Reply(content=other.content, headers={**other.headers, REQUEST_ID_HEADER: "another"}),
        Reply(),
    ]
    assert client.compute_log_prob(batch) == {"status": "success"}
    assert server.connections == 2
    assert len({request.headers[REQUEST_ID_HEADER.lower()] for request in server.seen}) == 2
    assert len({request.headers["idempotency-key"] for request in server.seen}) == 1
    server.script = [QUEUED, frame_reply({}, {}, {"job_id": "f" * 32})]
    with pytest.raises(InvalidAnswer, match=f"{JOB} was asked for, and that of {'f' * 32}"):
        client.compute_log_prob(batch)


FORKS = """
import os, sys, threading, time
import numpy as np
from nexrl_client import HTTPTrainServiceClient

client = HTTPTrainServiceClient(sys.argv[1], request_timeout=20)
ids = np.ones((4, 6), np.int64)

def call():
    answer = client.compute_log_prob({"input_ids": ids, "responses": ids[:, 3:]})
    return answer["batch"]["old_log_probs"].shape == (4, 3)

thread = threading.Thread(target=call)
thread.start()
while "torch" not in sys.modules:
    time.sleep(0.0005)
child = os.fork()
if child == 0:
    os._exit(0 if call() else 1)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.timeout(60)
def test_a_child_that_is_forked_while_a_thread_imports_torch_does_not_wait_for_that_thread(
    server: ScriptedServer,
) -> None:
    """The first result makes tensors; what its thread was in the middle of would stay so in the
    child for ever."""
    server.script = [frame_reply({"old_log_probs": np.zeros((4, 3), np.float32)}, {}, {})]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, server.url], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr


def test_what_is_no_service_is_said_at_once() -> None:
    """Something that speaks no HTTP, or no TLS: neither learns it by being asked again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                with listener.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(b"-ERR unknown command 'GET'\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InvalidAnswer, match="speaks no HTTP"):
            HTTPTrainServiceClient(address).get_models()
        with pytest.raises(InvalidAnswer, match="no TLS with"):
            HTTPTrainServiceClient(f"https://{address}").get_models()
        thread.join()


def test_closed_client(server: ScriptedServer) -> None:
    """After close, or the with block, calls say so at once."""
    with HTTPTrainServiceClient(server.url) as client:
        client.barrier()
    with pytest.raises(ClientClosed):
        client.barrier()


def test_proxies_are_not_for_loopback(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxy settings of the environment are honoured, except towards this machine itself."""
    proxy = ScriptedServer()
    try:
        proxy.script = [Reply(content={"status": "through the proxy"})]
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert HTTPTrainServiceClient(server.url).barrier() == {"status": "success"}
        outside = HTTPTrainServiceClient("http://nexrl.invalid:8000")
        assert outside.barrier() == {"status": "through the proxy"}
    finally:
        proxy.close()


def test_refusal_while_uploading(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """A refusal is raised as what it is, at once."""
    server.script = [error_reply("TOO_LARGE", "over the limit")]
    with pytest.raises(TooLarge, match="over the limit"):
        client.update_actor({"input_ids": np.zeros((4, 100_000), int)})
    assert len(server.seen) == 1


def test_nobody_there() -> None:
    """An address where nothing listens is Unreachable, with the address, once the time is spent."""
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        HTTPTrainServiceClient("127.0.0.1:9", request_timeout=0.3).barrier()
