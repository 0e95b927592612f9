"""Large batches in parts: a batch is put together from them before anything runs."""

from __future__ import annotations

from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Path, Request
from nexrl_contract.names import CHECKSUM_HEADER
from starlette.responses import Response

from nexrl_gateway.openapi import answered, refused
from nexrl_gateway.responses import PartView, PayloadView, json_response
from nexrl_gateway.services import Here
from nexrl_gateway.uploads import store_part

PayloadId = Annotated[
    str, Path(pattern="^[0-9a-f]{32}$", description="32 hex digits, made by the client.")
]
router = APIRouter(tags=["payloads"])


@router.put(
    "/payloads/{payload_id}/parts/{part}",
    summary="Upload one part of a frame",
    responses={**answered(PartView), **refused(400, 413, 415, 422, 507)},
    openapi_extra={
        "requestBody": {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            }
        }
    },
)
async def put_part(
    request: Request,
    services: Here,
    payload_id: PayloadId,
    part: Annotated[int, Path(ge=0, lt=100_000, description="From 0.")],
    checksum: Annotated[
        str,
        Header(
            alias=CHECKSUM_HEADER, pattern="^[0-9a-fA-F]{32}$", description="xxh3-128 of the part."
        ),
    ],
) -> Response:
    """The parts, joined in order, are one frame. The same part may be sent again."""
    nbytes = await store_part(services, request, payload_id, part, checksum)
    return json_response({"payload": payload_id, "part": part, "nbytes": nbytes})


@router.get(
    "/payloads/{payload_id}",
    summary="Which parts are there",
    responses={**answered(PayloadView), **refused(404, 422)},
)
async def show_payload(services: Here, payload_id: PayloadId) -> Response:
    """The numbers of the parts, and their bytes so far."""

    def look() -> dict[str, object]:
        nbytes = services.store.nbytes(payload_id)
        return {"payload": payload_id, "parts": services.store.parts(payload_id), "nbytes": nbytes}

    return json_response(await run_sync(look))
