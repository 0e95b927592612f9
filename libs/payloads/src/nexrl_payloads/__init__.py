"""Where the bytes of batches and results live between gateway and ranks: a shared folder, or Redis.

    store = open_store("file:///data/payloads")          # or redis://host:port/1
    with store.create(job_id, nbytes) as upload:         # gateway: streams a request's body
        upload.write(chunk)
        ref = upload.commit()
    with store.open(job_id) as payload:                  # rank: maps or fetches only its rows
        ids = payload.torch("input_ids", slice(0, 64))

Every refusal is a ``ServiceError``: NO_SPACE, STORE_UNAVAILABLE, PAYLOAD_NOT_FOUND,
CHECKSUM_MISMATCH, PAYLOAD_DAMAGED, MALFORMED or INVALID_ARGUMENT. Rows or tensors that a frame does
not have are tensor_codec's ``InvalidRows`` and ``UnknownTensor``.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from nexrl_contract.errors import ServiceError

from .protocol import (
    RESULT_SUFFIX,
    Chunk,
    PartUpload,
    Payload,
    PayloadStore,
    Rows,
    StoredPayload,
    Upload,
)

__all__ = [
    "RESULT_SUFFIX",
    "Chunk",
    "PartUpload",
    "Payload",
    "PayloadStore",
    "Rows",
    "StoredPayload",
    "Upload",
    "open_store",
]


def open_store(url: str, *, fsync: bool = False) -> PayloadStore:
    """The store at ``file:///absolute/folder`` (made if missing) or ``redis://``, ``rediss://``,
    ``unix://``.

    ``fsync`` makes the folder's payloads survive a power cut; a Redis server has its own setting
    for that. Raises INVALID_ARGUMENT for any other URL and STORE_UNAVAILABLE for a folder that
    cannot be made.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        from .file_store import FileStore

        return FileStore(Path(unquote(parts.path)), fsync=fsync)
    if parts.scheme in ("redis", "rediss", "unix"):
        from .redis_store import RedisStore  # users of a folder need no Redis client

        return RedisStore(url)
    raise ServiceError(
        "INVALID_ARGUMENT",
        "the payload store must be file:///absolute/folder or redis://host:port/db",
        url=parts.scheme,
    )
