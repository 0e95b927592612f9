"""A payload or a part on its way into Redis: chunks under a token of their own until a record names
them."""

from __future__ import annotations

from contextlib import suppress
from typing import Self

import redis
from nexrl_contract.errors import ServiceError

from .common import Tally, byte_views, same_part
from .files import unique
from .protocol import Chunk, StoredPayload
from .redis_client import CHUNK_BYTES, KEY_TTL_S, chunk_key, redis_errors, sums_key
from .redis_records import Record, Segment, store_part, store_record
from .redis_wire import ChunkSender


class _Chunks:
    """Joins what is written to chunks and sends each by one SET; holds one chunk at the most."""

    def __init__(
        self, client: redis.Redis, payload_id: str, nbytes: int | None, what: str, *, whole: bool
    ) -> None:
        self._client = client
        self._payload_id = payload_id
        self._token = unique("")
        self._tally = Tally(what, nbytes, whole=whole)
        self._sender = ChunkSender(client)
        self._joined = memoryview(bytearray(CHUNK_BYTES))
        self._filled = 0
        self._sent = 0
        self._settled = False

    def write(self, *chunks: Chunk) -> None:
        views = byte_views(chunks)
        self._tally.add(views)
        for view in views:
            while view.nbytes:
                view = self._take(view)

    def abort(self) -> None:
        """Remove what was sent, as far as Redis answers; what stays has a TTL and is swept."""
        if not self._settled:
            self._settled = True
            with suppress(
                ServiceError
            ):  # a chunk on its way would otherwise be stored after its removal
                self._sender.settle()
            self._remove()

    def _remove(self) -> None:
        keys = [chunk_key(self._payload_id, self._token, chunk) for chunk in range(self._sent + 1)]
        keys.append(sums_key(self._payload_id, self._token))
        with suppress(redis.RedisError):
            self._client.unlink(*keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    def _take(self, view: memoryview) -> memoryview:
        """Take one chunk's worth and return the rest."""
        if self._filled == 0 and view.nbytes >= CHUNK_BYTES:
            self._send(view[:CHUNK_BYTES])
            return view[CHUNK_BYTES:]
        count = min(CHUNK_BYTES - self._filled, view.nbytes)
        self._joined[self._filled : self._filled + count] = view[:count]
        self._filled += count
        if self._filled == CHUNK_BYTES:
            self._flush()
        return view[count:]

    def _flush(self) -> None:
        if self._filled:
            self._send(self._joined[: self._filled])
            self._filled = 0

    def _send(self, chunk: memoryview) -> None:
        self._sender.send(chunk_key(self._payload_id, self._token, self._sent), chunk)
        self._sent += 1

    def _finish(self, claimed: str | None) -> None:
        """All chunks and their checksums are in Redis."""
        self._tally.finish()
        self._tally.verify(claimed)
        self._flush()
        self._sender.settle()
        with redis_errors():
            self._client.set(
                sums_key(self._payload_id, self._token), self._tally.sums(), ex=KEY_TTL_S
            )
        # from here on a lost answer may hide a success: only the sweep removes these chunks
        self._settled = True


class RedisUpload(_Chunks):
    """See :class:`nexrl_payloads.Upload`."""

    def __init__(self, client: redis.Redis, payload_id: str, nbytes: int | None) -> None:
        super().__init__(client, payload_id, nbytes, f"payload {payload_id}", whole=False)

    def commit(self) -> StoredPayload:
        self._finish(None)
        record = Record(self._payload_id, [Segment(self._token, self._tally.nbytes, "")])
        return store_record(self._client, record, self._tally.sums())


class RedisPart(_Chunks):
    """See :class:`nexrl_payloads.PartUpload`."""

    def __init__(self, client: redis.Redis, payload_id: str, n: int, nbytes: int | None) -> None:
        self._n = n
        self._what = f"part {n} of payload {payload_id}"
        super().__init__(client, payload_id, nbytes, self._what, whole=True)

    def commit(self, checksum: str | None) -> int:
        self._finish(checksum)
        segment = Segment(self._token, self._tally.nbytes, self._tally.checksum)
        kept = store_part(self._client, self._payload_id, self._n, segment)
        if kept != segment:
            self._remove()
            same_part(self._payload_id, self._n, kept[1:], segment[1:])
        return segment.nbytes
