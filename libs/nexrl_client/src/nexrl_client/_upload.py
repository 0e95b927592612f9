"""A call's way to the service: with its frame in one request, or with parts sent ahead where that
is large."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nexrl_contract.names import CHECKSUM_HEADER, FRAME_TYPE, JSON_TYPE
from tensor_codec import Encoded

from ._body import Body
from ._call import Call, split_for_requests
from ._exchange import Budget, Exchange
from ._transport import Request, Response

Progress = Callable[[int], None] | None


def post(
    exchange: Exchange,
    call: Call,
    query: Mapping[str, str],
    *,
    wait: bool,
    timeout_s: float | None,
    max_request_bytes: int,
    progress: bool,
) -> tuple[Response, Budget]:
    """Send the call; wait lets the service answer with the result. The budget is what the answer
    left of timeout_s."""
    with _bar(call, progress) as on_bytes:
        if call.frame is not None and call.frame.nbytes > max_request_bytes:
            fields = call.params | _send_parts(
                exchange, call.frame, max_request_bytes, timeout_s, on_bytes
            )
            body, content = Body([json.dumps(fields).encode()]), JSON_TYPE
        elif call.frame is not None:
            body, content = Body(list(call.frame), on_bytes), FRAME_TYPE
        else:
            body, content = Body([json.dumps(call.params).encode()]), JSON_TYPE
        headers = {
            "Content-Type": content,
            "Accept": f"{FRAME_TYPE}, {JSON_TYPE}",
            "Idempotency-Key": call.key,
        }

        def build(wait_s: float) -> Request:
            prefer = f"respond-async, wait={int(wait_s)}" if wait else "respond-async"
            return Request("POST", call.path, query, headers | {"Prefer": prefer}, body)

        budget = Budget(timeout_s)
        return exchange.send(build, budget), budget


def _send_parts(
    exchange: Exchange, frame: Encoded, max_size: int, timeout_s: float | None, on_bytes: Progress
) -> dict[str, object]:
    """Put the frame's parts, each repeated by itself until timeout_s is spent on it; what the call
    says of them."""
    payload = uuid.uuid4().hex
    parts = split_for_requests(frame, max_size)
    for number, part in enumerate(parts):
        path = f"/payloads/{payload}/parts/{number}"
        headers = {"Content-Type": "application/octet-stream", CHECKSUM_HEADER: part.checksum()}
        request = Request("PUT", path, headers=headers, body=Body(part.views, on_bytes))
        exchange.send(lambda _, request=request: request, Budget(timeout_s))  # type: ignore[misc]
    return {"payload": payload, "parts": len(parts)}


@contextmanager
def _bar(call: Call, wanted: bool) -> Iterator[Progress]:
    """A progress bar of the frame's bytes on standard error, where it is wanted."""
    if not wanted or call.frame is None:
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(
        total=call.frame.nbytes,
        desc=call.operation,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance
