"""The weight-sync path: a link that always leads to one whole version, and never overwrites what is not ours."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from nexrl_checkpointer.publish import publish
from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import Export, write_manifest
from nexrl_worker.checkpoint.publish import PlainPath, VersionedPath
from toy_checkpoints import make_request


def put(target: VersionedPath | PlainPath, number: int) -> None:
    """Publish a version that says its number in two files."""
    target.check()
    folder = target.begin()
    (folder / "a").write_text(str(number))
    (folder / "b").write_text(str(number))
    record = Export(
        identifier="student", step=0, fingerprint=None, created=time.time(), files=(), weight_version=number
    )
    write_manifest(folder, record)
    target.commit()


def test_a_reader_sees_one_whole_version_at_every_moment(tmp_path: Path) -> None:
    """While versions fly by, the path is never missing, and who resolves it once reads files of one version."""
    target = VersionedPath(tmp_path / "sync", "student")
    put(target, 0)
    current, stop, seen, mixed = [0], threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            before = current[0]
            folder = (tmp_path / os.readlink(tmp_path / "sync")).absolute()
            try:
                pair = (folder / "a").read_text(), (folder / "b").read_text()
            except FileNotFoundError:
                if current[0] - before < 1:
                    mixed.append(f"{folder} vanished at {before}")
                continue
            seen.add(pair[0])
            if pair[0] != pair[1]:
                mixed.append(str(pair))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 120):
        put(target, number)
        current[0] = number
    stop.set()
    reader.join()
    assert mixed == [] and len(seen) > 3


def test_the_last_two_versions_stay(tmp_path: Path) -> None:
    """Older ones go, and so does what a killed save of the same group left."""
    target = VersionedPath(tmp_path / "sync", "student")
    (target.begin() / "half").write_text("killed here")
    for number in range(4):
        put(target, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sync.v3", ".sync.v4", "sync"]
    assert os.readlink(tmp_path / "sync") == ".sync.v4"


def test_a_discarded_version_leaves_nothing(tmp_path: Path) -> None:
    """A failed save leaves the path as it was."""
    target = VersionedPath(tmp_path / "sync", "student")
    put(target, 1)
    target.begin()
    target.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sync.v1", "sync"]


def test_two_groups_on_one_path_do_not_break_it(tmp_path: Path) -> None:
    """Each publishes whole versions; the later one is seen."""
    first, second = VersionedPath(tmp_path / "sync", "one"), VersionedPath(tmp_path / "sync", "two")
    folder = first.begin()
    put(second, 7)
    (folder / "a").write_text("8")
    first.commit()
    assert (tmp_path / "sync" / "a").read_text() == "8"


@pytest.mark.parametrize("kind", [VersionedPath, PlainPath])
def test_what_we_did_not_write_is_refused(tmp_path: Path, kind: type[VersionedPath | PlainPath]) -> None:
    """Folders, files and links of others, and checkpoints of the other kind, stay as they are."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("mine")
    publish(make_request(tmp_path, tmp_path / "sharded"), lambda: None)
    for name in ("mine", "file", "link", "sharded"):
        with pytest.raises(ServiceError, match="PATH_REFUSED"):
            kind(tmp_path / name, "student").check()
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_an_empty_folder_or_an_export_of_ours_is_replaced(tmp_path: Path) -> None:
    """Trainers make the folder beforehand; a plain export may become a weight-sync path."""
    (tmp_path / "empty").mkdir()
    put(VersionedPath(tmp_path / "empty", "student"), 1)
    put(PlainPath(tmp_path / "ckpt-hf", "student"), 2)
    put(PlainPath(tmp_path / "ckpt-hf", "student"), 3)
    assert (tmp_path / "ckpt-hf" / "a").read_text() == "3" and not (tmp_path / "ckpt-hf").is_symlink()
    put(VersionedPath(tmp_path / "ckpt-hf", "student"), 4)
    assert (tmp_path / "ckpt-hf").is_symlink()
    assert json.loads((tmp_path / "ckpt-hf" / "nexrl.json").read_bytes())["ours"] is True
    assert (tmp_path / "empty" / "b").read_text() == "1"
