"""From a URL to the store that it names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from nexrl_contract.errors import ServiceError

from .protocol import PayloadStore


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
