"""What only the store in a folder promises."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore, files, open_store
from nexrl_payloads.file_parts import STEP

from tests.helpers.payloads import frame, send_part, some_bytes, url_of


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_in_order_parts_are_written_once(file_store: PayloadStore, folder: Path) -> None:
    """Parts in order grow the very file that becomes the payload; nothing is copied, and an
    abandoned part gives its room back."""
    send_part(file_store, "a", 0, b"x" * 1000)
    data = folder / ".parts-a" / "data-0"
    inode = data.stat().st_ino
    for n in range(1, 4):
        with file_store.put_part("a", n, 5000) as abandoned:
            abandoned.write(b"z" * 5000)
        assert data.stat().st_size == 1000 * n
        with file_store.put_part("a", n, 1000) as part:
            part.write(b"y" * 1000)
            assert data.stat().st_size == 1000 * (n + 1)
            part.commit(None)
        assert [name for name in entries(folder / ".parts-a") if "part-" not in name] == [
            "data-0",
            "lock",
        ]
    file_store.assemble("a", 4)
    assert (folder / "a").stat().st_ino == inode
    assert b"".join(file_store.stream("a")) == b"x" * 1000 + b"y" * 3000


def test_a_kill_before_a_part_counts(file_store: PayloadStore, folder: Path) -> None:
    """Its bytes are there and nobody vouches for them: they are written over, or removed."""
    send_part(file_store, "a", 0, b"first")
    for n in (1, 2):
        (folder / ".parts-a" / f"data-{n}").write_bytes(b"nobody's")
    assert file_store.parts("a") == [0]
    for n in (2, 1):
        send_part(file_store, "a", n, b"sound")
    assert file_store.assemble("a", 3).nbytes == 15
    assert b"".join(file_store.stream("a")) == b"firstsoundsound"


def test_parts_are_never_on_the_disk_twice(file_store: PayloadStore, folder: Path) -> None:
    """Whatever their order, the first part's file becomes the payload, and each other part leaves
    its own file as it goes there."""
    nbytes = 3 * STEP + 1
    for n in (2, 0, 1):
        send_part(file_store, "a", n, some_bytes(nbytes, n))
    assert (
        sum(name.startswith("data-") for name in entries(folder / ".parts-a")) == 2
    )  # 1 is in place
    inode = (folder / ".parts-a" / "data-0").stat().st_ino
    most = _most_bytes_while(folder, lambda: file_store.assemble("a", 3))
    assert most <= 3 * nbytes + STEP + 65536  # a file takes whole pages
    assert (folder / "a").stat().st_ino == inode
    assert not any(name.startswith("data-") for name in entries(folder / ".parts-a"))
    assert b"".join(file_store.stream("a")) == b"".join(some_bytes(nbytes, n) for n in range(3))


def _most_bytes_while(folder: Path, act: Callable[[], object]) -> int:
    """The largest that the blocks of payloads and parts have been, looked at before each cut."""
    seen = []
    cut = os.ftruncate

    def look(fd: int, length: int) -> None:
        files = [*folder.glob("a"), *folder.glob(".parts-a/data-*")]
        seen.append(sum(path.stat().st_blocks * 512 for path in files))
        cut(fd, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nexrl_payloads.file_parts.os.ftruncate", look)
        act()
    return max(seen)


def test_replicas_and_restarts(file_store: PayloadStore, folder: Path) -> None:
    """Every request may go to another gateway, or to one that has just started."""
    for n in (0, 2, 1):
        send_part(open_store(url_of(folder)), "a", n, bytes([n]) * 10)
    ref = open_store(url_of(folder)).assemble("a", 3)
    assert open_store(url_of(folder)).assemble("a", 3) == ref
    assert b"".join(file_store.stream("a")) == b"\0" * 10 + b"\1" * 10 + b"\2" * 10


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("fsync", [False, True])
def test_a_kill_at_any_step_of_putting_together(fsync: bool, folder: Path) -> None:
    """A gateway that dies while it puts a payload together leaves a state that the next request
    completes, from another gateway too: every system call that changes the folder is tried."""
    sizes = [STEP + 7, 2 * STEP, 0, 2 * STEP + 11, 5]
    parts = [some_bytes(nbytes, n) for n, nbytes in enumerate(sizes)]
    killed_at, steps = 0, 0
    while killed_at == steps:
        killed_at += 1
        store, name = open_store(url_of(folder), fsync=fsync), f"a{killed_at}"
        for n in (3, 1, 0, 4, 2):
            send_part(store, name, n, parts[n])
        steps = _killed(killed_at, lambda store=store, name=name: store.assemble(name, 5))  # type: ignore[misc]
        again = open_store(url_of(folder), fsync=fsync)
        send_part(again, name, 1, parts[1])
        assert again.parts(name) == [0, 1, 2, 3, 4]
        ref = again.assemble(name, 5)
        assert again.assemble(name, 5) == ref
        assert b"".join(again.stream(name, ref.checksum)) == b"".join(parts)
        with pytest.raises(ServiceError, match="put together already"):
            send_part(again, name, 5, b"late")
        again.delete(name)
    assert killed_at > 15
    assert entries(folder) == []


def _killed(at: int, act: Callable[[], object]) -> int:
    """Die at the ``at``-th step of ``act``; returns how many steps there were."""
    steps = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return call(*arguments, **named)

        return step

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        for name in ("pwritev", "ftruncate", "replace", "unlink", "utime", "open"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        act()
    return steps


def test_private_to_the_owner(file_store: PayloadStore, folder: Path) -> None:
    """Batches are nobody else's business: folders 0700, files 0600."""
    file_store.put("a", [b"x"])
    for n in (0, 2):
        send_part(file_store, "b", n, b"x")
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_only_the_rows_are_mapped(file_store: PayloadStore, folder: Path) -> None:
    """A rank that reads a quarter of the rows has a quarter of the file in memory (and what the
    kernel maps around)."""
    quarter, around = 16 << 20, 4 << 20
    file_store.put("a", [frame({"x": np.ones((64, quarter * 4 // 64 // 8))})])
    with file_store.open("a") as payload:
        rows = payload.torch("x", slice(16, 32))
        assert _resident_bytes(folder / "a") <= around
        assert rows.sum() == quarter // 8
        assert quarter <= _resident_bytes(folder / "a") < quarter + 2 * around


def _resident_bytes(path: Path) -> int:
    """Bytes of the mapped file that are this process's memory."""
    mapping = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1]
    resident = next(line for line in mapping.splitlines() if line.startswith("Rss:"))
    return int(resident.split()[1]) * 1024


def test_disk_full(small_disk: Path) -> None:
    """Where there is no room, NO_SPACE comes before the bytes if the length was announced; nothing
    stays behind."""
    store = open_store(url_of(small_disk / "payloads"))
    with pytest.raises(ServiceError) as error:
        store.create("a", 8 << 20)
    assert error.value.code == "NO_SPACE"
    with pytest.raises(ServiceError) as error, store.create("a") as upload:
        for _ in range(8):
            upload.write(bytes(1 << 20))
    assert error.value.code == "NO_SPACE"
    assert entries(small_disk / "payloads") == []
    store.put("a", [bytes(3 << 20)])


def test_disk_full_between_parts(small_disk: Path) -> None:
    """A part without room is refused and gives its room back; parts that are there stay, and the
    payload is whole."""
    store = open_store(url_of(small_disk / "payloads"))
    send_part(store, "a", 0, b"x" * (1 << 20))
    for n in (1, 2):
        with pytest.raises(ServiceError) as error, store.put_part("a", n) as part:
            for _ in range(8):
                part.write(bytes(1 << 20))
        assert error.value.code == "NO_SPACE"
        with pytest.raises(ServiceError) as error:
            store.put_part("a", n, 8 << 20)
        assert error.value.code == "NO_SPACE"
    assert store.parts("a") == [0]
    send_part(store, "a", 1, b"y" * (1 << 20))
    send_part(store, "a", 2, b"z" * (1 << 20))
    store.assemble("a", 3)
    assert b"".join(store.stream("a")) == b"x" * (1 << 20) + b"y" * (1 << 20) + b"z" * (1 << 20)


def test_no_room_to_merge(small_disk: Path) -> None:
    """Parts that arrived keep counting when there is no room to put them together; NO_SPACE says so
    until there is."""
    store = open_store(url_of(small_disk / "payloads"))
    store.put("other", [bytes((5 << 19) - 65536)])
    send_part(store, "a", 1, b"y" * (3 << 19))
    send_part(store, "a", 0, b"x" * 1000)
    assert store.parts("a") == [0, 1]
    with pytest.raises(ServiceError) as error:
        store.assemble("a", 2)
    assert error.value.code == "NO_SPACE"
    assert store.parts("a") == [0, 1]
    store.delete("other")
    assert store.assemble("a", 2).nbytes == (3 << 19) + 1000
    assert b"".join(store.stream("a")) == b"x" * 1000 + b"y" * (3 << 19)


def test_file_size_limit(file_store: PayloadStore, folder: Path) -> None:
    """A limit of the process is a full disk too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        for announced in (None, 2 << 20):
            with pytest.raises(ServiceError) as error, file_store.create("a", announced) as upload:
                upload.write(some_bytes(2 << 20))
            assert error.value.code == "NO_SPACE"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(folder) == []


def test_a_folder_that_went_away(file_store: PayloadStore, folder: Path) -> None:
    """A store whose folder is gone says so in its check and when it is written to; so does one that
    is no folder.

    A mount may come back; what is in the way, or may not be written to, stays.
    """
    folder.rmdir()
    attempts = (
        file_store.check,
        lambda: file_store.create("a"),
        lambda: file_store.put_part("a", 0),
    )
    for passes in (True, False):
        for attempt in attempts:
            with pytest.raises(ServiceError) as error:
                attempt()
            assert (error.value.code, error.value.retryable) == ("STORE_UNAVAILABLE", passes)
        folder.touch()


@pytest.mark.parametrize("n", [0, 1])
def test_a_part_that_a_disk_did_not_keep_is_sent_again(
    n: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was renamed to what counts before the disk refused: what is refused must not count."""
    store, parts = (
        open_store(url_of(folder), fsync=True),
        [some_bytes(4096, seed=i) for i in (1, 2)],
    )
    if n == 1:
        send_part(store, "a", 0, parts[0])

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(files, "sync_folder", refuse)
        with pytest.raises(ServiceError):
            send_part(store, "a", n, parts[n])
    for number in range(n, 2):
        send_part(store, "a", number, parts[number])

    store.assemble("a", 2)
    assert (folder / "a").read_bytes() == b"".join(parts)


def test_fsync_changes_no_bytes(folder: Path) -> None:
    """With fsync every way of writing gives the same payloads."""
    store = open_store(url_of(folder), fsync=True)
    store.put("a", [b"whole"])
    for n in (1, 0):
        send_part(store, "b", n, bytes([n]))
    store.assemble("b", 2)
    assert b"".join(store.stream("a")) == b"whole"
    assert b"".join(store.stream("b")) == b"\0\1"


def test_a_payload_is_a_file(file_store: PayloadStore, folder: Path) -> None:
    """Of the payload's name and bytes, for whoever looks at the folder."""
    file_store.put("a.result", [b"bytes"])
    assert (folder / "a.result").read_bytes() == b"bytes"
