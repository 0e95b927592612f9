"""HTTPTrainServiceClient: the service over HTTP.

A call goes _run -> _post -> exchange (which repeats it) -> the transport.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

from nexrl_contract.names import CHECKSUM_HEADER, FRAME_TYPE, JSON_TYPE
from tensor_codec import Encoded

from ._api import BatchLike, TrainServiceClient
from ._call import MAX_REQUEST_BYTES, Call, prepare, split_for_requests
from ._exchange import Budget, checked, exchange, read_json, read_result
from ._handle import JobHandle
from ._transport import Body, HTTPTransport, Request, Response, Transport, normalise_url
from .errors import (
    ClientError,
    InvalidAnswer,
    JobRunning,
    ServiceFault,
    ServiceTimeout,
    Unreachable,
)

_HEALTH_TIMEOUT_S = 10.0
_POLL_S = 0.05
_JSON = {"Accept": JSON_TYPE}
_ANY = {"Accept": f"{FRAME_TYPE}, {JSON_TYPE}"}
_OnBytes: TypeAlias = Callable[[int], object] | None


class HTTPTrainServiceClient(TrainServiceClient):
    """A client of one worker group over HTTP.

    Threads may share it. Pickled, it connects anew. Close it, or use it in a with statement.

    A call is repeated on lost connections, 429, 502 and 503 until request_timeout is spent. It has
    one idempotency key, so nothing runs twice. Connecting counts, and may take 10 s at most;
    uploading does not count. A batch above max_request_bytes is uploaded in parts of that size, and
    runs as one.

    identifier None means the only group there is. progress=True shows a bar while a batch is
    uploaded. transport replaces the network, see nexrl_client.testing. config is the group's entry
    of a service's configuration, for an initialize_worker() without arguments.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        identifier: str | None = None,
        *,
        request_timeout: float | None = 200,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        progress: bool = False,
        transport: Transport | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(identifier, request_timeout, config)
        if max_request_bytes < 1:
            raise ClientError(
                f"max_request_bytes is {max_request_bytes}; give the bytes of the largest request"
            )
        self.base_url = normalise_url(base_url)
        self._max_request_bytes = max_request_bytes
        self._progress = progress
        self._transport = transport or HTTPTransport(self.base_url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.base_url!r}, identifier={self.identifier!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; jobs go on. Later calls raise ClientClosed."""
        self._transport.close()

    def submit(self, operation: str, batch: BatchLike | None = None, **params: Any) -> JobHandle:
        call = prepare(operation, batch, params, self.identifier, self._config)
        return self._handle(self._post(call, wait=False)[0], call)

    def _run(
        self, operation: str, batch: BatchLike | None, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        call = prepare(operation, batch, params, self.identifier, self._config)
        response, budget = self._post(call, wait=True)
        if response.status == 202:
            return self._handle(response, call).result_within(budget)
        return read_result(response, call.ignored)

    def health_check(self) -> dict[str, Any]:
        given = self.request_timeout
        timeout = _HEALTH_TIMEOUT_S if given is None else min(_HEALTH_TIMEOUT_S, given)
        request = Request("GET", "/health", headers=_JSON, connect_s=timeout)
        response = self._transport.send(request, timeout)
        body = read_json(response if response.status == 503 else checked(request, response))
        if "status" not in body:
            raise InvalidAnswer(
                f"/health answered {response.status} without a status; is this the service's "
                "address?"
            )
        return body

    def get_models(self) -> dict[str, Any]:
        return self._json("GET", "/get_models")

    def worker_info(self) -> dict[str, Any]:
        return self._json("GET", "/worker_info", self._query())

    def jobs(self, limit: int = 100) -> list[dict[str, Any]]:
        """Records of the last jobs, newest first: of this client's group, or without an identifier
        of all groups."""
        answer = self._json("GET", "/jobs", self._query() | {"limit": str(limit)})
        if not isinstance(answer.get("jobs"), list):
            raise InvalidAnswer("/jobs answered without jobs; is this the service's address?")
        jobs: list[dict[str, Any]] = answer["jobs"]
        return jobs

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job whose id was kept; raises JobNotFound or Expired."""
        return JobHandle(job_id, str(self.job_view(job_id).get("operation", "")), self)

    def job_view(self, job_id: str) -> dict[str, Any]:
        return self._json("GET", f"/jobs/{job_id}")

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        return self._json("DELETE", f"/jobs/{job_id}")

    def job_result(self, job: JobHandle, budget: Budget) -> dict[str, Any] | None:
        """The job's result, asked for once; None where it has not ended, ServiceTimeout where the
        budget has. Of an endless budget an outage is borne for request_timeout seconds."""
        outage = budget
        if budget.endless:
            outage = Budget(self.request_timeout, budget, longest_wait_s=budget.longest_wait_s)
        asked = time.monotonic()
        try:
            answer = exchange(self._transport, self._result_request(job), outage)
            return _of_job(job, read_result(answer, job.ignored))
        except JobRunning as running:
            if budget.remaining() <= 0:
                waits_for = running.details.get("waits_for")
                why = f" (it waits for {waits_for})" if waits_for else ""
                raise _timeout(job, f"has no result yet{why}") from None
        except (Unreachable, ServiceTimeout) as error:
            raise _timeout(job, f"cannot be asked for ({error.message})") from error
        except ServiceFault as error:
            error.job = job
            raise
        # An answer that was not held back: the gateway is stopping.
        if time.monotonic() - asked < _POLL_S:
            time.sleep(min(_POLL_S, budget.remaining()))
        return None

    def _result_request(self, job: JobHandle) -> Callable[[float], Request]:
        path = f"/jobs/{job.id}/result"
        return lambda wait_s: Request("GET", path, {"wait": f"{wait_s:.3g}"}, _ANY)

    def _post(self, call: Call, *, wait: bool) -> tuple[Response, Budget]:
        """Post the call. A frame above max_request_bytes is uploaded in parts first.

        wait lets the service answer with the result. The budget is what the answer left of
        request_timeout.
        """
        query, frame = self._query(), call.frame
        with _bar(call, self._progress) as on_bytes:
            if frame is not None and frame.nbytes <= self._max_request_bytes:
                body, content = Body(list(frame), on_bytes), FRAME_TYPE
            else:
                parts = {} if frame is None else self._send_parts(frame, on_bytes)
                body, content = Body([json.dumps(call.params | parts).encode()]), JSON_TYPE
            headers = {**_ANY, "Content-Type": content, "Idempotency-Key": call.key}

            def build(wait_s: float) -> Request:
                prefer = f"respond-async, wait={int(wait_s)}" if wait else "respond-async"
                return Request("POST", call.path, query, headers | {"Prefer": prefer}, body)

            budget = Budget(self.request_timeout)
            return exchange(self._transport, build, budget), budget

    def _send_parts(self, frame: Encoded, on_bytes: _OnBytes) -> dict[str, object]:
        """Put the frame's parts, each repeated by itself until request_timeout is spent on it; what
        the call says of them."""
        payload = uuid.uuid4().hex
        parts = split_for_requests(frame, self._max_request_bytes)
        for number, part in enumerate(parts):
            path = f"/payloads/{payload}/parts/{number}"
            headers = {"Content-Type": "application/octet-stream", CHECKSUM_HEADER: part.checksum()}
            body = Body(part.views, on_bytes)
            self._repeated(Request("PUT", path, headers=headers, body=body))
        return {"payload": payload, "parts": len(parts)}

    def _handle(self, response: Response, call: Call) -> JobHandle:
        # 200 is what initialize_worker gets for a group that already runs: the job that made it.
        job_id = read_json(response).get("id" if response.status == 202 else "job_id")
        if not isinstance(job_id, str):
            raise InvalidAnswer(
                f"{call.path} answered {response.status} without a job; is this the service's "
                "address?"
            )
        return JobHandle(job_id, call.operation, self, call.ignored)

    def _json(
        self, method: str, path: str, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        return read_json(self._repeated(Request(method, path, query or {}, _JSON)))

    def _repeated(self, request: Request) -> Response:
        return exchange(self._transport, lambda _: request, Budget(self.request_timeout))

    def _query(self) -> dict[str, str]:
        return {} if not self.identifier else {"identifier": self.identifier}


def _of_job(job: JobHandle, result: dict[str, Any]) -> dict[str, Any]:
    """The result; raises InvalidAnswer where it says that it is another job's."""
    answered = result.get("meta_info", result).get("job_id") or job.id
    if answered != job.id:
        raise InvalidAnswer(
            f"the result of job {job.id} was asked for, and that of {answered} answered"
        )
    return result


def _timeout(job: JobHandle, why: str) -> ServiceTimeout:
    message = (
        f"{job.operation} {why}; the job goes on, and .job.result() of this error waits for it"
    )
    return ServiceTimeout(message, job_id=job.id, job=job)


@contextmanager
def _bar(call: Call, wanted: bool) -> Iterator[_OnBytes]:
    """A progress bar of the frame's bytes on standard error, where it is wanted."""
    if not wanted or call.frame is None:
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total, binary = call.frame.nbytes, {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=total, desc=call.operation, leave=False, **binary) as bar:
        yield bar.update
