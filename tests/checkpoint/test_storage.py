"""What the six verbs promise: every storage behind the seam passes these."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from nexrl_contract.errors import ServiceError
from nexrl_storage import at, local_folder
from nexrl_storage import local as durable
from nexrl_storage.local import LocalStorage
from nexrl_storage.protocol import Storage, join


@pytest.fixture(params=[LocalStorage])
def storage(request: pytest.FixtureRequest) -> Storage:
    made: Storage = request.param()
    return made


@pytest.fixture(params=[True, False], ids=["one-step", "two-renames"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can swap two names."""
    if not request.param:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    return bool(request.param)


def folder(storage: Storage, uri: str, content: str) -> str:
    storage.write(join(uri, "file"), (content.encode(),))
    return uri


def content(storage: Storage, uri: str) -> str:
    with storage.open(join(uri, "file")) as file:
        return file.read().decode()


def test_what_is_written_is_hashed_and_read_back(tmp_path: Path, storage: Storage) -> None:
    """In pieces, into a folder that is made for it; written again it is replaced."""
    uri = join(tmp_path, "a", "b", "file")
    for text in (b"first, and longer", b"second"):
        written = storage.write(uri, (text[:3], memoryview(text)[3:], b""))
        assert written == (len(text), hashlib.sha256(text).hexdigest())
        with storage.open(uri) as file:
            assert file.read() == text
    assert storage.look(join(tmp_path, "a", "b")) == ("folder", {"file": "file"})


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path, storage: Storage) -> None:
    """And nothing beside it."""

    def pieces() -> object:
        yield b"half"
        raise KeyboardInterrupt

    folder(storage, str(tmp_path), "former")
    with pytest.raises(KeyboardInterrupt):
        storage.write(join(tmp_path, "file"), pieces())  # type: ignore[arg-type]
    assert content(storage, str(tmp_path)) == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_look_tells_what_is_there(tmp_path: Path, storage: Storage) -> None:
    """A link is a link, wherever it leads; nothing is None, also below a file."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    storage.make(join(tmp_path, "folder"))
    kinds = {"file": "file", "link": "link", "folder": "folder"}
    assert storage.look(tmp_path) == ("folder", kinds)
    for name, kind in kinds.items():
        assert storage.look(join(tmp_path, name)) == (kind, {})
    assert storage.look(join(tmp_path, "gone")) is None
    assert storage.look(join(tmp_path, "file", "x")) is None


def test_a_move_never_replaces_unless_told_to(tmp_path: Path, storage: Storage) -> None:
    """Neither folder, file nor link; an empty folder counts as nothing."""
    new = folder(storage, join(tmp_path, ".new"), "new")
    folder(storage, join(tmp_path, "folder"), "old")
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("folder")
    for name in ("folder", "file", "link"):
        with pytest.raises(FileExistsError):
            storage.move(new, join(tmp_path, name))
    storage.make(join(tmp_path, "empty"))
    assert storage.move(new, join(tmp_path, "empty")) is None
    assert content(storage, join(tmp_path, "empty")) == "new"


@pytest.mark.usefixtures("swaps")
def test_a_move_that_replaces_says_where_the_former_one_is(
    tmp_path: Path, storage: Storage
) -> None:
    """A hidden sibling; nobody but the caller deletes it."""
    path = folder(storage, join(tmp_path, "ckpt"), "old")
    former = storage.move(folder(storage, join(tmp_path, ".new"), "new"), path, replace=True)
    assert content(storage, path) == "new"
    assert former is not None and Path(former).parent == tmp_path and Path(former).name[0] == "."
    assert content(storage, former) == "old"


def test_a_removal_takes_what_it_is_told_to(tmp_path: Path, storage: Storage) -> None:
    """A folder only when it is empty, unless recursive; of a link never what it leads to; what is
    missing is no error."""
    path = folder(storage, join(tmp_path, "folder"), "x")
    (tmp_path / "link").symlink_to("folder")
    storage.remove(join(tmp_path, "link"), recursive=True)
    with pytest.raises(OSError, match="not empty"):
        storage.remove(path)
    assert content(storage, path) == "x"
    for _ in range(2):
        storage.remove(path, recursive=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ask", [at, local_folder], ids=["at", "local_folder"])
def test_a_scheme_without_a_storage_is_refused(ask: object) -> None:
    """It is not taken for a path."""
    with pytest.raises(ServiceError, match="HDFS_NOT_CONFIGURED"):
        ask("hdfs://name/ckpt")  # type: ignore[operator]
