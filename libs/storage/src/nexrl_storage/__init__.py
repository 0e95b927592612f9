"""Where checkpoints lie: six verbs on URIs, the local file system behind them, the manifest, and
publishing."""

from __future__ import annotations

import os
from pathlib import Path

from nexrl_contract.errors import ServiceError

from nexrl_storage.local import LocalStorage
from nexrl_storage.protocol import Storage, Uri

__all__ = ["at", "local_folder"]

_LOCAL = LocalStorage()


def at(uri: Uri) -> Storage:
    """The storage of a URI; raises ``HDFS_NOT_CONFIGURED`` for one that is not set up."""
    if "://" in os.fspath(uri):
        raise ServiceError("HDFS_NOT_CONFIGURED", f"there is no storage for {uri}; give a path")
    return _LOCAL


def local_folder(uri: Uri) -> Path:
    """A folder on this machine with what is at ``uri``: of a local one itself, links resolved.

    Ranks map its files. Raises as :func:`at` does.
    """
    at(uri)
    return Path(uri).resolve()
