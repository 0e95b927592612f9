"""Which folders a request may name: checkpoints and models below their roots, never our own files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import EXPORT

from nexrl_gateway.settings import Settings

LONGEST_NAME = 180
"""Bytes in the name of a checkpoint's folder: hidden siblings add up to 74 (``..new-``, an identifier, ``.link``)."""
LONGEST_PART = 255
LONGEST_PATH = 3700
"""Bytes; Linux allows 4096, and the longest file inside, below a hidden sibling, adds some 340."""
_VERSION = re.compile(r"\.(.+)\.v\d+")


@dataclass(frozen=True, slots=True)
class Roots:
    """Resolved folders. Relative checkpoint paths lead below ``checkpoints[0]``; ``models`` None allows any folder."""

    checkpoints: tuple[Path, ...]
    models: tuple[Path, ...] | None
    own: Path

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """A checkpoint may always serve as a model; without model roots, only a loopback gateway allows others."""
        checkpoints = tuple(Path(os.path.realpath(root)) for root in (settings.data, *settings.checkpoint_roots))
        models = tuple(Path(os.path.realpath(root)) for root in settings.model_roots)
        anywhere = not models and settings.on_loopback
        return cls(
            checkpoints, None if anywhere else (*models, *checkpoints), Path(os.path.realpath(settings.own_folder))
        )

    def checkpoint(self, given: str, key: str, longest_name: int = LONGEST_PART) -> str:
        """The absolute path of a checkpoint; raises PATH_REFUSED (HDFS_NOT_CONFIGURED for an hdfs:// URL).

        Links in the folders above are resolved; a link in its place (the weight-sync folder is one) is kept.
        """
        path = _path(given, key, self.checkpoints[0])
        if not _below(path, self.checkpoints) or not _below(_resolved(path, key), self.checkpoints):
            named = ", ".join(map(str, self.checkpoints))
            raise _refused(
                key, given, f"it is not below a checkpoint root ({named}); a relative path means below the first"
            )
        self._refuse_own(path, given, key)
        _refuse_long(path, given, key, longest_name)
        return str(path)

    def target(self, given: str, key: str) -> str:
        """As :meth:`checkpoint`, of a path that is to be written: it can be made, and is in no weight-sync folder."""
        path = Path(self.checkpoint(given, key, LONGEST_NAME))
        for folder in path.parents:
            if os.path.lexists(folder):
                if not folder.is_dir():
                    raise _refused(key, given, f"{folder} is no folder")
                break
        for folder in (path, *path.parents):
            version = _VERSION.fullmatch(folder.name)
            if version is not None and _is_file(folder / EXPORT) and _below(folder, self.checkpoints):
                reason = f"{folder.with_name(version[1])} is a weight-sync folder, replaced whole by the next save"
                raise _refused(key, given, f"{reason}; choose a path outside of it")
        return str(path)

    def model(self, given: str, key: str) -> str:
        """The absolute path of a model folder with a config.json; raises PATH_REFUSED or INVALID_CONFIG."""
        path = _path(given, key, self.models[0] if self.models else Path.cwd())
        if self.models is not None and not _below(_resolved(path, key), self.models):
            raise _refused(key, given, f"it is not below a model root ({', '.join(map(str, self.models))})")
        self._refuse_own(path, given, key)
        if not _is_file(path / "config.json"):
            raise ServiceError(
                "INVALID_CONFIG", f"{key}: there is no model folder with a config.json at {path}", key=key
            )
        return str(path)

    def _refuse_own(self, path: Path, given: str, key: str) -> None:
        for place in (path, _resolved(path, key)):
            if place == self.own or self.own in place.parents:
                raise _refused(key, given, "the service keeps its own files there")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, a folder that may not be entered
        return False


def settle(params: dict[str, Any], roots: Roots) -> dict[str, Any]:
    """The parameters of a checkpoint operation with absolute paths; raises as :meth:`Roots.checkpoint` does."""
    if params.get("hdfs_path") is not None:
        raise ServiceError("HDFS_NOT_CONFIGURED", "hdfs_path: this service has no HDFS; leave it out", key="hdfs_path")
    place = {"path": roots.checkpoint, "local_path": roots.target}
    return {name: place[name](value, name) if name in place else value for name, value in params.items()}


def _path(given: str, key: str, base: Path) -> Path:
    if given.startswith("hdfs://"):
        raise ServiceError("HDFS_NOT_CONFIGURED", f"{key}: this service has no HDFS; give a local path", key=key)
    path = base / given
    if "\0" in given or "://" in given or path.name in ("", ".."):
        raise _refused(key, given, "it is not the path of a folder")
    return _resolved(path.parent, key) / path.name


def _resolved(path: Path, key: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        raise _refused(key, str(path), "it cannot be resolved") from None


def _refuse_long(path: Path, given: str, key: str, longest_name: int) -> None:
    for part, longest in ((path.name, longest_name), *((part, LONGEST_PART) for part in path.parts)):
        if len(os.fsencode(part)) > longest:
            raise _refused(key, given, f"a name in it has {len(os.fsencode(part))} bytes; {longest} are possible")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise _refused(key, given, f"it has {len(os.fsencode(path))} bytes; {LONGEST_PATH} are possible")


def _below(path: Path, roots: tuple[Path, ...]) -> bool:
    return any(root in path.parents for root in roots)


def _refused(key: str, given: str, reason: str) -> ServiceError:
    return ServiceError("PATH_REFUSED", f"{key} {given[:200]!a} is refused: {reason}", key=key)
