"""Which folders a request may name: checkpoints and models below their roots, never our own
files."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nexrl_contract.errors import ServiceError
from nexrl_storage.manifest import EXPORT
from nexrl_storage.publish import VERSION

from nexrl_gateway.settings import Settings
from nexrl_gateway.strict_json import JSON

LONGEST_NAME = 180
"""Bytes in the name of a checkpoint's folder: hidden siblings add up to 74 (``..new-``, an
identifier, ``.link``)."""
LONGEST_PART = 255
LONGEST_PATH = 3700
"""Bytes; Linux allows 4096, and the longest file inside, below a hidden sibling, adds some 340."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_NOT_EXPANDED = ("~", "$")
# Control characters, line and paragraph separators: nobody meant them.
_UNMEANT = frozenset({"Cc", "Zl", "Zp"})


@dataclass(frozen=True, slots=True)
class Roots:
    """Resolved folders. Relative checkpoint paths lead below ``checkpoints[0]``; ``models`` None
    allows any folder."""

    checkpoints: tuple[Path, ...]
    models: tuple[Path, ...] | None
    own: Path

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """A checkpoint may always serve as a model; without model roots, only a loopback gateway
        allows others."""
        checkpoints = tuple(
            Path(os.path.realpath(root)) for root in (settings.data, *settings.checkpoint_roots)
        )
        models = tuple(Path(os.path.realpath(root)) for root in settings.model_roots)
        anywhere = not models and settings.on_loopback
        return cls(
            checkpoints,
            None if anywhere else (*models, *checkpoints),
            Path(os.path.realpath(settings.own_folder)),
        )

    def checkpoint(self, given: str, key: str, longest_name: int = LONGEST_PART) -> str:
        """The absolute path of a checkpoint; raises PATH_REFUSED (HDFS_NOT_CONFIGURED for an
        hdfs:// URL).

        Links in the folders above are resolved; a link in its place (the weight-sync folder is one)
        is kept.
        """
        path = _path(given, key, self.checkpoints[0])
        if not _below(path, self.checkpoints) or not _below(_resolved(path, key), self.checkpoints):
            reason = (
                f"it is not below a checkpoint root ({', '.join(map(str, self.checkpoints))}); a "
                "relative path means below the first, and `nexrl up --checkpoint-root DIR` adds "
                f"one (Compose: NEXRL_DATA is the root){self._model_hint(path)}"
            )
            raise _refused(key, given, reason)
        self._refuse_own(path, given, key)
        _refuse_long(path, given, key, longest_name)
        return str(path)

    def target(self, given: str, key: str) -> str:
        """As :meth:`checkpoint`, of a path that is to be written: it can be made, and is in no
        weight-sync folder."""
        path = Path(self.checkpoint(given, key, LONGEST_NAME))
        for folder in path.parents:
            if os.path.lexists(folder):
                if not folder.is_dir():
                    raise _refused(key, given, f"{folder} is no folder")
                break
        for folder in (path, *path.parents):
            version = VERSION.fullmatch(folder.name)
            exported = version is not None and _is_file(folder / EXPORT)
            if version is not None and exported and _below(folder, self.checkpoints):
                sync = folder.with_name(version[1])
                reason = f"{sync} is a weight-sync folder, replaced whole by the next save"
                raise _refused(key, given, f"{reason}; choose a path outside of it")
        return str(path)

    def model(self, given: str, key: str) -> str:
        """The absolute path of a model folder with a config.json; raises PATH_REFUSED or
        INVALID_CONFIG.

        A relative one means below the first model root; without roots it would mean wherever the
        service was started.
        """
        relative = not given.startswith(("/", *_NOT_EXPANDED)) and "://" not in given
        if self.models is None and relative:
            hint = self._relative_hint(given)
            raise _refused(key, given, f"it is not absolute; give the whole path of a folder{hint}")
        path = _path(given, key, self.models[0] if self.models else Path("/"))
        if self.models is not None and not _below(_resolved(path, key), self.models):
            reason = (
                f"it is not below a model root ({', '.join(map(str, self.models))}); "
                "`nexrl up --model-root DIR` sets one (Compose: NEXRL_MODELS)"
            )
            raise _refused(key, given, reason)
        self._refuse_own(path, given, key)
        if not _is_file(path / "config.json"):
            hint = _folder_hint(path, given)
            message = f"{key}: there is no model folder with a config.json at {path}{hint}"
            raise ServiceError("INVALID_CONFIG", message, key=key)
        return str(path)

    def _relative_hint(self, given: str) -> str:
        """Which folder a relative model path may have meant."""
        for root in self.checkpoints:
            if _is_file(root / given / "config.json"):
                return f", such as {root / given}"
        return _hub_hint(given)

    def _model_hint(self, path: Path) -> str:
        """For a model's folder that was given as a checkpoint, where models may be read from it."""
        if (self.models is None or _below(path, self.models)) and _is_file(path / "config.json"):
            return "; this is a model's folder: initialize_worker takes it as actor.model.path"
        return ""

    def _refuse_own(self, path: Path, given: str, key: str) -> None:
        for place in (path, _resolved(path, key)):
            if place == self.own or self.own in place.parents:
                raise _refused(key, given, "the service keeps its own files there")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system, a folder that may not be entered
        return False


def resolve_paths(params: JSON, roots: Roots) -> JSON:
    """The parameters of a checkpoint operation with absolute paths; raises as
    :meth:`Roots.checkpoint` does."""
    if params.get("hdfs_path") is not None:
        message = "hdfs_path: this service has no HDFS; leave it out"
        raise ServiceError("HDFS_NOT_CONFIGURED", message, key="hdfs_path")
    place = {"path": roots.checkpoint, "local_path": roots.target}
    return {
        name: place[name](value, name) if name in place else value for name, value in params.items()
    }


def _path(given: str, key: str, base: Path) -> Path:
    if given.startswith("hdfs://"):
        message = f"{key}: this service has no HDFS; give a local path"
        raise ServiceError("HDFS_NOT_CONFIGURED", message, key=key)
    unmeant = next((letter for letter in given if unicodedata.category(letter) in _UNMEANT), None)
    if unmeant is not None:
        raise _refused(key, given, f"it holds the character {unmeant!a}")
    if given.startswith(_NOT_EXPANDED):
        reason = "is not expanded here, since the service has another home; write it out"
        raise _refused(key, given, f"{given[0]} {reason}")
    path = base / given
    if "://" in given or path.name in ("", ".."):
        raise _refused(key, given, "it is not the path of a folder")
    return _resolved(path.parent, key) / path.name


def _folder_hint(path: Path, given: str) -> str:
    """What may be there instead of a model's folder."""
    if _is_file(path):
        return "; that is a file: give its folder"
    with contextlib.suppress(OSError):
        for config in path.glob("snapshots/*/config.json"):
            return f"; it is a cache of the Hugging Face hub: give {config.parent}"
    if given.startswith("/"):
        return ""
    return f" (a relative path means below the first model root){_hub_hint(given)}"


def _hub_hint(given: str) -> str:
    if not _HUB_ID.fullmatch(given):
        return ""
    hint = f"hf download {given} --local-dir DIR, then give DIR"
    return f"; a model of the Hugging Face hub is downloaded first: {hint}"


def _resolved(path: Path, key: str) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        raise _refused(key, str(path), "it cannot be resolved") from None


def _refuse_long(path: Path, given: str, key: str, longest_name: int) -> None:
    limits = [("a name in it", path.name, longest_name)]
    limits += [("a name in it", part, LONGEST_PART) for part in path.parts]
    for what, part, longest in [*limits, ("it", str(path), LONGEST_PATH)]:
        if (nbytes := len(os.fsencode(part))) > longest:
            raise _refused(key, given, f"{what} has {nbytes} bytes; {longest} are possible")


def _below(path: Path, roots: tuple[Path, ...]) -> bool:
    return any(root in path.parents for root in roots)


def _refused(key: str, given: str, reason: str) -> ServiceError:
    return ServiceError("PATH_REFUSED", f"{key} {given[:200]!a} is refused: {reason}", key=key)
