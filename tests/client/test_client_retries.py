"""Bad networks, busy services, and time: what is repeated, what is not, and for how long."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import numpy as np
import pytest
from nexrl_client import (
    GroupDown,
    HTTPTrainServiceClient,
    InvalidAnswer,
    InvalidURL,
    InvalidValue,
    JobNotFound,
    NexRLError,
    NoSpace,
    OperationFailed,
    RedisUnavailable,
    Rejected,
    ServiceTimeout,
    TooManyQueued,
    Unavailable,
    Unreachable,
)

from tests.helpers.scripted_server import Reply, ScriptedServer, error_reply, frame_reply

JOB = "0123456789ab7bbbbbbbbbbbbbbbbbbb"
QUEUED = Reply(202, {"id": JOB, "operation": "barrier", "state": "queued"})
RUNNING = error_reply("JOB_RUNNING", job_id=JOB)


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(drop=True),
        Reply(cut=3),
        Reply(429, b"slow down"),
        Reply(502, b"<html>bad gateway</html>"),
        Reply(503, b""),
        Reply(504, b"upstream timed out"),
        error_reply("TOO_MANY_QUEUED"),
        error_reply("GROUP_DOWN"),
        error_reply("REDIS_UNAVAILABLE"),
        error_reply("STORE_UNAVAILABLE"),
        error_reply("GATEWAY_BUSY"),
        error_reply("SLOW_REQUEST"),
    ],
    ids=lambda reply: (
        "dropped" if reply.drop else "cut" if reply.cut else f"{reply.status} {reply.body[:40]!r}"
    ),
)
def test_what_passes_is_retried(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any], trouble: Reply
) -> None:
    """A lost answer or a passing refusal is repeated with the same key and the same bytes, so that
    it runs once."""
    server.script = [trouble, trouble, frame_reply({}, {"x": 1}, {})]
    assert client.update_actor(batch)["metrics"] == {"x": 1}
    assert len(server.seen) == 3
    assert len({request.headers["idempotency-key"] for request in server.seen}) == 1
    assert len({request.content for request in server.seen}) == 1


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (error_reply("INVALID_VALUE"), InvalidValue),
        (error_reply("OPERATION_FAILED", rank=1), OperationFailed),
        (error_reply("NO_SPACE"), NoSpace),
        (error_reply("GROUP_DOWN", job_id=JOB), GroupDown),
        (Reply(500, b"oops"), NexRLError),
        (
            Reply(
                503, {"error": {"code": "GROUP_DOWN", "message": "for good", "retryable": False}}
            ),
            GroupDown,
        ),
    ],
)
def test_what_stays_is_raised(
    server: ScriptedServer, client: HTTPTrainServiceClient, refusal: Reply, kind: type[NexRLError]
) -> None:
    """What the same request would meet again, and how a job ended, is raised at once."""
    server.script = [refusal, Reply()]
    with pytest.raises(kind):
        client.barrier()
    assert len(server.seen) == 1


def test_an_answer_that_is_not_the_services_says_who_gave_it(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """A page, another program's error object, nothing at all: the address, its server and the
    status are named."""
    headers = {"Content-Type": "text/html; charset=utf-8", "Server": "nginx/1.25"}
    server.script = [Reply(403, b"<html>\n Forbidden </html>", headers)]
    with pytest.raises(
        Rejected, match=f"{server.url} .*answered POST /barrier with 403 and text/html.*Forbidden"
    ) as page:
        client.barrier()
    assert "\n" not in str(page.value) and page.value.code is None
    server.script = [Reply(404, {"error": {"code": 404, "message": "no route"}})]
    with pytest.raises(Rejected, match=r"no answer of the service.*no route"):
        client.barrier()
    server.script = [Reply(200, b"<html>log in</html>", headers)]
    with pytest.raises(InvalidAnswer, match=f"{server.url}.* no JSON"):
        client.barrier()


def test_a_proxy_that_cannot_be_used_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SOCKS needs a library that is not there, and what is no address stays none."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for proxy, said in (("socks5://127.0.0.1:9", "SOCKS"), ("http://", "no address")):
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy)
        with pytest.raises(InvalidURL, match=said):
            HTTPTrainServiceClient("http://training.invalid").get_models()


def test_retry_after_is_honoured(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """The service's Retry-After is the least time until the next try."""
    busy = error_reply("TOO_MANY_QUEUED")
    server.script = [Reply(429, busy.body, {"Retry-After": "1"}), Reply()]
    client.barrier()
    first, second = server.seen
    assert 1.0 <= second.at - first.at < 2.5


def test_retry_after_the_time_is_spent(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """A Retry-After beyond the time there is gives up at once, with the service's error."""
    server.script = [Reply(429, error_reply("TOO_MANY_QUEUED").body, {"Retry-After": "60"})]
    start = time.monotonic()
    with pytest.raises(TooManyQueued) as caught:
        client.barrier()
    assert caught.value.details["retry_after_s"] == 60
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Reply(drop=True), Unreachable),
        (error_reply("GROUP_DOWN"), GroupDown),
        (Reply(502, b"no"), Unavailable),
    ],
)
def test_retries_end_with_request_timeout(
    server: ScriptedServer, client: HTTPTrainServiceClient, trouble: Reply, kind: type[NexRLError]
) -> None:
    """Trouble that does not pass is raised when request_timeout, read at this call, is spent; not
    long before or after."""
    server.script = [trouble]
    client.request_timeout = 0.8
    start = time.monotonic()
    with pytest.raises(kind):
        client.barrier()
    assert 0.3 < time.monotonic() - start < 2
    assert len(server.seen) > 2


def test_timeout_names_the_job(
    server: ScriptedServer, client: HTTPTrainServiceClient, batch: dict[str, Any]
) -> None:
    """A job that takes longer raises with its handle, which later gives the result; the request was
    sent once."""
    server.script = [QUEUED, RUNNING]
    client.request_timeout = 0.5
    start = time.monotonic()
    with pytest.raises(ServiceTimeout) as caught:
        client.update_actor(batch)
    assert 0.5 <= time.monotonic() - start < 1.5
    job = caught.value.job
    assert job is not None
    assert job.id == caught.value.job_id == JOB
    assert JOB in str(caught.value)
    server.script = [frame_reply({}, {"x": 2}, {})]
    result = job.result()
    assert result["metrics"] == {"x": 2}
    assert result["meta_info"]["ignored"] == ["prompts", "uid"]
    assert [request.method for request in server.seen].count("POST") == 1


def test_result_without_waiting(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """result(timeout=0) asks once."""
    server.script = [QUEUED, RUNNING]
    job = client.submit("barrier")
    with pytest.raises(ServiceTimeout):
        job.result(timeout=0)
    assert len(server.seen) == 2


def test_result_without_limit_bears_outages(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """result() waits through lost connections and restarts of the gateway."""
    server.script = [QUEUED, Reply(drop=True), RUNNING, error_reply("REDIS_UNAVAILABLE"), Reply()]
    assert client.submit("barrier").result()["status"] == "success"


def test_result_without_limit_gives_up_on_a_lost_service(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """An outage longer than request_timeout ends even that wait, with the handle."""
    server.script = [QUEUED, Reply(drop=True)]
    client.request_timeout = 0.5
    job = client.submit("barrier")
    with pytest.raises(ServiceTimeout) as caught:
        job.result()
    assert caught.value.job is job
    server.script = [error_reply("REDIS_UNAVAILABLE")]
    with pytest.raises(RedisUnavailable) as refused:
        job.result()
    assert refused.value.job is job


def test_failed_job_raises_its_error(
    server: ScriptedServer, client: HTTPTrainServiceClient
) -> None:
    """How the job ended is raised with rank and message, also when it says that the group is down;
    unknown jobs too."""
    server.script = [QUEUED, error_reply("OPERATION_FAILED", "boom", rank=1, job_id=JOB)]
    with pytest.raises(OperationFailed, match="boom") as caught:
        client.barrier()
    assert (caught.value.rank, caught.value.job_id) == (1, JOB)
    server.script = [QUEUED, error_reply("GROUP_DOWN", "rank 0 died", job_id=JOB)]
    with pytest.raises(GroupDown, match="rank 0 died"):
        client.barrier()
    server.script = [QUEUED, error_reply("JOB_NOT_FOUND")]
    with pytest.raises(JobNotFound):
        client.barrier()
    assert len(server.seen) == 6


def test_silence_is_a_timeout(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """A service that accepts and never answers is given up soon after the time is spent."""
    server.script = [Reply(delay_s=30)]
    client.request_timeout = 0.2
    start = time.monotonic()
    with pytest.raises(ServiceTimeout):
        client.barrier()
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("call", ["barrier", "health_check", "get_models"])
def test_request_timeout_bounds_connecting(call: str) -> None:
    """An address that takes no connections, as a host behind a firewall, is given up when
    request_timeout is spent."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # the queue of connections is full: the next one gets no answer at all
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        client = stack.enter_context(
            HTTPTrainServiceClient(f"127.0.0.1:{listener.getsockname()[1]}")
        )
        client.request_timeout = 0.7
        start = time.monotonic()
        with pytest.raises(Unreachable):
            getattr(client, call)()
        assert 0.6 < time.monotonic() - start < 1.5


def test_uploading_does_not_count(server: ScriptedServer, client: HTTPTrainServiceClient) -> None:
    """A slow line is not the service's delay: after an upload longer than request_timeout there
    still is time to wait."""
    server.script = [
        Reply(503, b"", read_bytes_s=0.1),
        Reply(202, QUEUED.content),
        RUNNING,
        frame_reply({}, {"x": 3}, {}),
    ]
    client.request_timeout = 1.5
    start = time.monotonic()
    assert client.update_actor({"input_ids": np.zeros((4, 800_000), np.int64)})["metrics"] == {
        "x": 3
    }
    assert time.monotonic() - start > 2.0


def test_each_part_is_retried_by_itself(server: ScriptedServer) -> None:
    """A part that got lost or damaged is put again, the others are not."""
    server.script = [
        Reply(),
        Reply(drop=True),
        error_reply("CHECKSUM_MISMATCH"),
        Reply(),
        Reply(),
        frame_reply({}, {}, {}),
    ]
    with HTTPTrainServiceClient(server.url, "student", max_request_bytes=500_000) as client:
        client.update_actor({"input_ids": np.zeros((4, 40_000), np.int64)})
    assert [request.path.rpartition("/")[2] for request in server.seen] == [
        "0",
        "1",
        "1",
        "1",
        "2",
        "update_actor",
    ]
    assert len({request.content for request in server.seen[1:4]}) == 1
