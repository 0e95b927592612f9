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

from .opening import open_store
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
