"""One part of an upload on its way into the payload store."""

from __future__ import annotations

from typing import Any

import anyio
from anyio.to_thread import run_sync
from fastapi import Request

from nexrl_gateway.bodies import declared_length, pieces, refuse_encoding
from nexrl_gateway.intake import write_body
from nexrl_gateway.services import Services


async def store_part(
    services: Services, request: Request, payload_id: str, part: int, checksum: str
) -> int:
    """Stream the body as one part and return its bytes; raises TOO_LARGE, CHECKSUM_MISMATCH or
    NO_SPACE."""
    refuse_encoding(request)
    body = pieces(request, services.settings.max_body_bytes, "send smaller parts")
    upload = await run_sync(services.store.put_part, payload_id, part, declared_length(request))
    try:
        await write_body(request, body, bytearray(), upload)
        return await run_sync(upload.commit, checksum)
    finally:
        with anyio.CancelScope(shield=True):
            await run_sync(upload.abort)


def list_parts(services: Services, payload_id: str) -> dict[str, Any]:
    """The parts that are there; raises PAYLOAD_NOT_FOUND."""
    nbytes = services.store.nbytes(payload_id)
    return {"payload": payload_id, "parts": services.store.parts(payload_id), "nbytes": nbytes}
