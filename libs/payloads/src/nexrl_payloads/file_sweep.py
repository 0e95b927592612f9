"""What in the folder nobody needs any more, judged by the time of the last write or touch."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from .common import age_limit, is_id
from .file_parts import PARTS
from .file_uploads import SUMS, TEMPORARY, sums_path
from .files import unique

_GONE = ".gone-"


def sweep_folder(
    folder: Path, in_use: set[str], *, result_age_s: float, upload_age_s: float
) -> list[str]:
    """See :meth:`nexrl_payloads.PayloadStore.sweep`; files of other programs are left alone."""
    removed = set()
    for path in list(folder.iterdir()):
        if path.name.startswith(_GONE):
            shutil.rmtree(path, ignore_errors=True)
            continue
        payload_id, limit = _owner(path, result_age_s, upload_age_s)
        if payload_id is None or payload_id in in_use or _age_s(path) < limit:
            continue
        removed.add(payload_id)
        if path.name.startswith(PARTS):
            remove_parts(path)
        else:
            path.unlink(missing_ok=True)
            sums_path(folder, path.name).unlink(missing_ok=True)
    return sorted(removed)


def remove_parts(folder: Path) -> None:
    """Remove a folder of parts; it vanishes at once, so that nobody sees a half-removed one."""
    gone = folder.with_name(unique(_GONE))
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _owner(path: Path, result_age_s: float, upload_age_s: float) -> tuple[str | None, float]:
    """The payload that an entry belongs to, None for a stranger, and the age that it may reach."""
    name = path.name
    if name.startswith(TEMPORARY):
        return name.removeprefix(TEMPORARY).rpartition("-")[0], upload_age_s
    if name.startswith(PARTS):
        return name.removeprefix(PARTS), upload_age_s
    if name.startswith(SUMS):  # they go with their payload; by themselves only where it never came
        payload_id = name.removeprefix(SUMS)
        return (None if path.with_name(payload_id).exists() else payload_id), upload_age_s
    return (name if is_id(name) and path.is_file() else None), age_limit(
        name, result_age_s, upload_age_s
    )


def _age_s(path: Path) -> float:
    """Seconds since the entry, or a file in it, was last written or touched; 0 if it has just
    gone."""
    try:
        times = [path.stat().st_mtime]
        if path.is_dir():
            times += [inner.stat().st_mtime for inner in path.iterdir()]
    except FileNotFoundError:
        return 0.0
    return time.time() - max(times)
