"""The weight-sync path: a link that always leads to one whole version, and never overwrites what is
not ours."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nexrl_checkpointer.publish import publish
from nexrl_contract.errors import ServiceError
from nexrl_storage import local as durable
from nexrl_storage.manifest import Export, describe, read_manifest, write_manifest
from nexrl_storage.publish import Replacement, Versions

from tests.helpers.toy_checkpoints import make_request

Kind = Callable[[Path, str], Replacement[Export]]


def plain(path: Path, identifier: str) -> Replacement[Export]:
    """A folder of its own, not a link to versions."""
    return Replacement(path, identifier, Export)


def put(target: Replacement[Export], number: int, identifier: str = "student") -> None:
    """Publish a version that says its number in two files."""
    target.check()
    fill(target.begin(), number, identifier)
    target.commit()


def fill(folder: Path, number: int, identifier: str = "student") -> None:
    """Write what a group would."""
    for name in "ab":
        (folder / name).write_text(str(number))
    record = Export(
        identifier=identifier,
        step=0,
        fingerprint=None,
        created=time.time(),
        files=tuple(describe(folder, name) for name in "ab"),
        weight_version=number,
    )
    write_manifest(folder, record)


@pytest.mark.parametrize("swaps", [True, False], ids=["a swap", "renames alone"])
def test_a_reader_sees_one_whole_version_at_every_moment(
    tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While versions fly by, the path is never missing, and who resolves it once reads files of one
    version; also on a file system that cannot swap two names, such as NFS."""
    if not swaps:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    target = Versions(tmp_path / "sync", "student")
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
    target = Versions(tmp_path / "sync", "student")
    (target.begin() / "half").write_text("killed here")
    for number in range(4):
        put(target, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sync.v3", ".sync.v4", "sync"]
    assert os.readlink(tmp_path / "sync") == ".sync.v4"


def test_a_discarded_version_leaves_nothing(tmp_path: Path) -> None:
    """A failed save leaves the path as it was."""
    target = Versions(tmp_path / "sync", "student")
    put(target, 1)
    target.begin()
    target.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sync.v1", "sync"]


def test_two_groups_on_one_path_are_told_apart(tmp_path: Path) -> None:
    """The second is refused by the first one's name, even where it began before; nothing of it
    stays."""
    first, second = Versions(tmp_path / "sync", "one"), Versions(tmp_path / "sync", "two")
    fill(first.begin(), 8, "one")
    put(second, 7, "two")
    for refused in (first.check, first.commit):
        with pytest.raises(
            ServiceError, match=r"PATH_REFUSED.* of group 'two'; choose another path"
        ):
            refused()
    first.discard()
    assert (tmp_path / "sync" / "a").read_text() == "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".sync.v1", "sync"]


@pytest.mark.parametrize("kind", [Versions, plain])
def test_what_we_did_not_write_is_refused(tmp_path: Path, kind: Kind) -> None:
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
    put(Versions(tmp_path / "empty", "student"), 1)
    put(plain(tmp_path / "ckpt-hf", "student"), 2)
    put(plain(tmp_path / "ckpt-hf", "student"), 3)
    assert (tmp_path / "ckpt-hf" / "a").read_text() == "3" and not (
        tmp_path / "ckpt-hf"
    ).is_symlink()
    put(Versions(tmp_path / "ckpt-hf", "student"), 4)
    assert (tmp_path / "ckpt-hf").is_symlink()
    assert json.loads((tmp_path / "ckpt-hf" / "nexrl.json").read_bytes())["ours"] is True
    assert (tmp_path / "empty" / "b").read_text() == "1"


def test_a_version_goes_without_what_others_put_into_it(tmp_path: Path) -> None:
    """A checkpoint that somebody saved below the path stays when its version's time has come, and
    ever after."""
    target = Versions(tmp_path / "model", "student")
    put(target, 1)
    publish(make_request(tmp_path, tmp_path / ".model.v1" / "step_1"), lambda: None)
    for number in range(2, 6):
        put(target, number)
    assert [path.name for path in (tmp_path / ".model.v1").iterdir()] == ["step_1"]
    assert read_manifest(tmp_path / ".model.v1" / "step_1") is not None
    assert sorted(path.name for path in tmp_path.glob(".model*")) == [
        ".model.v1",
        ".model.v4",
        ".model.v5",
    ]


@pytest.mark.parametrize("kind", [Versions, plain])
def test_an_export_that_others_use_is_not_replaced(tmp_path: Path, kind: Kind) -> None:
    """The refusal names what is in the way, at the start and again where it came while the export
    was written."""
    put(plain(tmp_path / "export", "student"), 1)
    target = kind(tmp_path / "export", "student")
    target.check()
    fill(target.begin(), 2)
    (tmp_path / "export" / "README.md").write_text("mine")
    for refused in (target.check, target.commit):
        with pytest.raises(
            ServiceError, match=r"PATH_REFUSED.*\(README\.md\); choose another path"
        ):
            refused()
    target.discard()
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "README.md",
        "a",
        "b",
        "nexrl.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("kind", [Versions, plain])
def test_what_comes_in_the_moment_of_the_swap_stays(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name, where no later save removes it."""
    exchange = durable._exchange

    def others_first(left: Path, right: Path) -> bool:
        if right.is_dir() and not right.is_symlink():
            (right / "README.md").write_text("mine")
        return exchange(left, right)

    put(plain(tmp_path / "export", "student"), 1)
    monkeypatch.setattr(durable, "_exchange", others_first)
    put(kind(tmp_path / "export", "student"), 2)
    monkeypatch.undo()
    put(kind(tmp_path / "export", "student"), 3)
    assert (tmp_path / "export" / "a").read_text() == "3"
    assert [path.read_text() for path in tmp_path.rglob("README.md")] == ["mine"]


@pytest.mark.parametrize("kind", [Versions, plain])
@pytest.mark.parametrize(
    "name", ["file/x", "n" * 245, "n" * 300], ids=["through-a-file", "245", "300"]
)
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, kind: Kind, name: str) -> None:
    """422 PATH_REFUSED that names the path, and nothing is left behind."""
    (tmp_path / "file").write_text("x")
    target = kind(tmp_path / name, "student")
    with pytest.raises(ServiceError, match=f"PATH_REFUSED: {tmp_path / name} ") as refused:
        put(target, 1)
    target.discard()
    assert refused.value.kind.status == 422 and [path.name for path in tmp_path.iterdir()] == [
        "file"
    ]


def test_a_version_without_its_link_does_not_stay(tmp_path: Path) -> None:
    """A name with room for a version but not for the link that is swapped in: no complete hidden
    model remains."""
    name = "n" * (255 - len("..new-student.lin"))
    target = Versions(tmp_path / name, "student")
    with pytest.raises(ServiceError, match="PATH_REFUSED"):
        put(target, 1)
    target.discard()
    assert list(tmp_path.iterdir()) == []
