"""Publishing: a save killed at any point leaves a checkpoint that loads, and a second attempt
completes it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import redis
from nexrl_checkpointer.publish import PublishRequest, discard, publish
from nexrl_checkpointer.retention import replace_previous
from nexrl_contract.errors import ServiceError
from nexrl_contract.names import CHECKPOINTS_KEY, GROUPS_KEY, group_key
from nexrl_contract.records import GroupRecord, Share
from nexrl_ledger import Ledger, connect
from nexrl_storage import local as durable
from nexrl_storage.manifest import describe, published, read_manifest

from tests.helpers.toy_checkpoints import leftovers, loads, make_request, make_state

OLD, NEW = make_state(1), make_state(2)


def run(client: redis.Redis, request: PublishRequest) -> None:
    """What the service does with a request of a living group."""
    publish(request, lambda: None)
    replace_previous(Ledger(client), request, submitted=time.time())


def make_group(client: redis.Redis, identifier: str = "student") -> None:
    """A group of that name, made now."""
    record = GroupRecord(identifier=identifier, state="ready", created_at=time.time())
    client.delete(group_key(identifier))
    client.hset(group_key(identifier), mapping=record.to_hash())
    client.sadd(GROUPS_KEY, identifier)


def publish_until_killed(url: str, request: PublishRequest, at: int) -> None:
    """Publish, and die of SIGKILL before the ``at``-th call that touches a file; return if there
    are fewer."""
    count = 0

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = (
            event == "open"
            and isinstance(arguments[2], int)
            and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in (
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.mkdir",
            "ctypes.dlopen",
            "shutil.rmtree",
        ):
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

    client = connect(url)
    client.ping()
    sys.addaudithook(before)
    run(client, request)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> BaseContext:
    """Starts processes from one that has no threads: a fork of this one may wait for a lock that
    nobody holds there."""
    monkeypatch.setenv(
        "PYTHONPATH", os.path.dirname(__file__)
    )  # where that process finds this module
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.parametrize(
    ("same_path", "foreign"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
    ids=["replacing", "removing-previous", "removing-previous-around-other-things"],
)
def test_killed_anywhere_a_checkpoint_loads_and_the_next_attempt_completes(
    tmp_path: Path, redis_url: str, processes: BaseContext, same_path: bool, foreign: bool
) -> None:
    """At every file operation: what is visible is whole, the old or the new one; afterwards the new
    one alone is left.

    And what others put into the folder of the previous one, at its place at every moment.
    """
    client, at, killed = connect(redis_url), 0, True
    make_group(client)
    while killed:
        at += 1
        data = tmp_path / str(at)
        first = make_request(data, data / "ckpt" / "step_1", OLD)
        run(client, first)
        notes = Path(first.path) / "huggingface" / "notes.txt"
        if foreign:
            notes.write_text("mine")
        path = Path(first.path) if same_path else data / "ckpt" / "step_2"
        second = make_request(data, path, NEW, remove_previous=True, step=2)
        child = processes.Process(target=publish_until_killed, args=(redis_url, second, at))
        child.start()
        child.join()
        killed = child.exitcode == -signal.SIGKILL
        assert killed or child.exitcode == 0
        assert notes.is_file() == foreign, f"killed at {at}: another's file is not at its place"
        visible = published([data / "ckpt"])
        assert visible, f"killed at {at}: nothing to load"
        assert all(loads(Path(found.path), OLD, NEW) for found in visible)
        run(client, second.model_copy(update={"attempt": 2}))
        assert [found.path for found in published([data / "ckpt"])] == [str(path)]
        assert loads(path, NEW) and leftovers(data) == []
        others = [file for file in Path(first.path).rglob("*") if file.is_file() and not same_path]
        assert others == ([notes] if foreign else [])
        shutil.rmtree(data)
    assert at > 15


def test_the_manifest_says_what_the_checkpoint_is(tmp_path: Path) -> None:
    """Every field, and every file with its size and hash."""
    request = make_request(
        tmp_path, tmp_path / "a" / "b" / "step_1", fingerprint="0123456789abcdef"
    )
    manifest = publish(request, lambda: None)
    fields = json.loads((Path(request.path) / "manifest.json").read_bytes())
    assert {
        name: fields[name]
        for name in ("schema_version", "kind", "identifier", "step", "seq", "world_size")
    } == {
        "schema_version": 1,
        "kind": "sharded",
        "identifier": "student",
        "step": 1,
        "seq": 5,
        "world_size": 3,
    }
    assert (fields["config_hash"], fields["weight_only"], fields["fingerprint"]) == (
        "c0ffee",
        False,
        "0123456789abcdef",
    )
    there = {
        str(path.relative_to(request.path))
        for path in Path(request.path).rglob("*")
        if path.is_file()
    }
    assert {entry.name for entry in manifest.files} | {"manifest.json"} == there
    assert all(describe(request.path, entry.name) == entry for entry in manifest.files)


def test_publishing_twice_is_once(tmp_path: Path) -> None:
    """A repeated job finds its own manifest and leaves the checkpoint alone."""
    request = make_request(tmp_path, tmp_path / "ckpt", NEW)
    first = publish(request, lambda: None)
    assert publish(request.model_copy(update={"attempt": 2}), lambda: None) == first


def test_an_attempt_that_was_replaced_publishes_nothing(tmp_path: Path) -> None:
    """A process that was paused after its last check finds nothing under its own name when it
    wakes."""
    request = make_request(tmp_path, tmp_path / "ckpt", NEW)

    def overtaken() -> None:
        publish(request.model_copy(update={"attempt": 2}), lambda: None)

    with pytest.raises(FileNotFoundError):
        publish(request, overtaken)
    assert loads(tmp_path / "ckpt", NEW) and leftovers(tmp_path) == []


def damage(folder: Path, what: str) -> None:
    if what == "flipped byte":
        file = folder / "model.rank1-of-3.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif what == "missing rank":
        (folder / "rank2-of-3.json").unlink()
    elif what == "missing file":
        (folder / "optim.rank0-of-3.safetensors").unlink()
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flipped byte", r"model\.rank1-of-3\.safetensors is corrupt"),
        ("missing rank", "rank 2 of 3 saved nothing"),
        ("missing file", r"optim\.rank0-of-3\.safetensors is missing"),
        ("missing staging", "is gone; save again"),
    ],
)
def test_a_damaged_save_is_never_published(tmp_path: Path, what: str, message: str) -> None:
    """It is refused by name, and the checkpoint that was there stays."""
    publish(make_request(tmp_path, tmp_path / "ckpt", OLD), lambda: None)
    request = make_request(tmp_path, tmp_path / "ckpt", NEW)
    damage(request.staging, what)
    with pytest.raises(ServiceError, match=message):
        publish(request, lambda: None)
    assert loads(tmp_path / "ckpt", OLD)


def foreign(path: Path, what: str) -> None:
    if what == "file":
        path.write_text("x")
    elif what == "link":
        path.symlink_to("elsewhere")
    else:
        path.mkdir()
        (path / ("manifest.json" if what == "other manifest" else "notes.txt")).write_text(
            '{"name": "a web app"}'
        )


@pytest.mark.parametrize("what", ["folder", "file", "link", "other manifest"])
def test_what_we_did_not_write_is_refused(tmp_path: Path, what: str) -> None:
    """Nothing of others is ever replaced: 422 PATH_REFUSED."""
    foreign(tmp_path / "ckpt", what)
    with pytest.raises(ServiceError, match="PATH_REFUSED"):
        publish(make_request(tmp_path, tmp_path / "ckpt"), lambda: None)
    assert os.path.lexists(tmp_path / "ckpt") and leftovers(tmp_path / "ckpt") == []


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    """A parent that cannot be a folder is the caller's error."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ServiceError, match="PATH_REFUSED"):
        publish(make_request(tmp_path, tmp_path / "file" / "ckpt"), lambda: None)


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A folder that no rename reaches from ``tmp_path``."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to copy to")
    folder = Path(tempfile.mkdtemp(dir=shared_memory))
    yield folder
    shutil.rmtree(folder)


def test_another_file_system_gets_a_copy(tmp_path: Path, other_file_system: Path) -> None:
    """Same result as a rename: whole, verified, nothing left behind on either side."""
    request = make_request(tmp_path, other_file_system / "ckpt", NEW)
    publish(request, lambda: None)
    assert loads(Path(request.path), NEW) and leftovers(tmp_path, other_file_system) == []


def test_without_an_exchange_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that cannot swap folders still get the new checkpoint, and no leftovers."""
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    publish(make_request(tmp_path, tmp_path / "ckpt", OLD), lambda: None)
    publish(make_request(tmp_path, tmp_path / "ckpt", NEW), lambda: None)
    assert loads(tmp_path / "ckpt", NEW) and leftovers(tmp_path) == []


def test_killed_between_two_renames_and_refused_afterwards_the_former_one_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two renames replace a checkpoint, a failed second attempt does not leave the group with
    none."""

    def killed(*_: object) -> bool:
        monkeypatch.setattr(os, "rename", killed_at_the_second)
        return False

    def killed_at_the_second(source: Path, target: Path) -> None:
        os.replace(source, target)
        raise KeyboardInterrupt

    publish(make_request(tmp_path, tmp_path / "ckpt", OLD), lambda: None)
    request = make_request(tmp_path, tmp_path / "ckpt", NEW)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "_exchange", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(request, lambda: None)
    monkeypatch.undo()
    assert not (tmp_path / "ckpt").exists()
    discard(request.model_copy(update={"attempt": 2}))
    assert loads(tmp_path / "ckpt", OLD) and leftovers(tmp_path) == []


class Saves:
    """Saves one after the other, as one group's queue gives them."""

    def __init__(self, data: Path, client: redis.Redis) -> None:
        self.data = data
        self.client = client

    def __call__(self, name: str, **changes: Any) -> Path:
        path = self.data / name
        run(self.client, make_request(self.data, path, NEW, **{"remove_previous": True, **changes}))
        return path

    def left(self) -> set[str]:
        return {str(Path(found.path).relative_to(self.data)) for found in published([self.data])}


@pytest.fixture
def saves(tmp_path: Path, redis_url: str) -> Saves:
    """Of two living groups, student and teacher."""
    client = connect(redis_url)
    for identifier in ("student", "teacher"):
        make_group(client, identifier)
    return Saves(tmp_path, client)


def test_a_new_save_removes_the_one_before(saves: Saves) -> None:
    """Only when asked to, and only the previous one."""
    saves("step_1")
    saves("step_2", remove_previous=False)
    saves("step_3")
    assert saves.left() == {"step_1", "step_3"}


def test_kinds_and_groups_do_not_remove_one_another(saves: Saves) -> None:
    """A weight-only save is not the previous one of a full save, and another group's is
    nobody's."""
    saves("full")
    saves("weights", weight_only=True)
    saves("teacher", identifier="teacher")
    saves("weights_2", weight_only=True)
    assert saves.left() == {"full", "teacher", "weights_2"}


def test_what_took_the_previous_ones_place_stays(saves: Saves) -> None:
    """A folder or a weight-sync link that now has the old name is not what was recorded, so it is
    kept."""
    path = saves("step_1")
    shutil.rmtree(path)
    (path.parent / ".step_1.v1").mkdir()
    path.symlink_to(".step_1.v1")
    saves("step_2")
    assert path.is_symlink() and (path.parent / ".step_1.v1").is_dir()


def test_a_checkpoint_inside_the_previous_one_does_not_remove_itself(saves: Saves) -> None:
    """A path below the previous checkpoint's keeps it."""
    saves("run")
    saves("run/step_2")
    assert read_manifest(saves.data / "run" / "step_2") is not None and "run" in saves.left()


def test_the_same_path_again_is_not_its_own_previous(saves: Saves) -> None:
    """Saving twice to one path leaves one checkpoint there."""
    saves("latest")
    saves("latest")
    assert saves.left() == {"latest"}


def test_a_later_group_of_the_same_name_removes_nothing_of_the_earlier_one(saves: Saves) -> None:
    """Destroyed and made again with the same identifier: the last checkpoint of the former run
    stays."""
    saves("run/step_1")
    saves("run/step_2")
    Ledger(saves.client).groups.mark_destroyed("student", None)
    make_group(saves.client)
    saves("other/step_1")
    assert saves.left() == {"run/step_2", "other/step_1"}
    saves("other/step_2")
    assert saves.left() == {"run/step_2", "other/step_2"}


def test_a_restart_of_the_groups_processes_is_the_same_group(saves: Saves) -> None:
    """A new epoch does not make the previous checkpoint another's."""
    saves("step_1")
    Ledger(saves.client).groups.start_epoch("student", [Share(agent="agent", slots=1, host="here")])
    saves("step_2")
    assert saves.left() == {"step_2"}


def test_a_save_that_outlived_its_group_removes_nothing(saves: Saves) -> None:
    """It is published, but is neither the previous one of the next group of that name nor removes
    anything."""
    saves("step_1")
    late = make_request(saves.data, saves.data / "late", remove_previous=True)
    submitted = time.time()
    publish(late, lambda: None)
    make_group(saves.client)
    replace_previous(Ledger(saves.client), late, submitted)
    saves("new")
    assert saves.left() == {"step_1", "late", "new"}


def test_a_save_that_was_taken_over_removes_nothing_that_came_after_it(
    tmp_path: Path, redis_url: str
) -> None:
    """Its first checkpointer lost Redis, and with it the lease, between publishing and removing; it
    wakes two saves later."""
    client = connect(redis_url)
    make_group(client)
    requests = [
        make_request(
            tmp_path, tmp_path / "ckpt" / f"step_{step}", NEW, remove_previous=True, step=step
        ).model_copy(update={"order": step})
        for step in (1, 2)
    ]
    submitted = time.time()
    publish(requests[0], lambda: None)
    for request in requests:  # the other checkpointer
        run(client, request.model_copy(update={"attempt": 2}))

    replace_previous(Ledger(client), requests[0], submitted)

    assert [Path(found.path).name for found in published([tmp_path / "ckpt"])] == ["step_2"]
    third = make_request(tmp_path, tmp_path / "ckpt" / "step_3", NEW, remove_previous=True, step=3)
    run(client, third.model_copy(update={"order": 3}))
    assert [Path(found.path).name for found in published([tmp_path / "ckpt"])] == ["step_3"]


def test_a_destroyed_group_leaves_no_record_of_its_checkpoints(saves: Saves) -> None:
    """Fields of the living ones stay."""
    saves("ours")
    saves("weights", weight_only=True)
    saves("theirs", identifier="teacher")
    ledger = Ledger(saves.client)
    ledger.groups.mark_destroyed("student", None)
    ledger.checkpoints.forget_destroyed()
    assert list(saves.client.hgetall(CHECKPOINTS_KEY)) == ["teacher:sharded"]
    late = make_request(saves.data, saves.data / "late")
    replace_previous(ledger, late, time.time())
    assert list(saves.client.hgetall(CHECKPOINTS_KEY)) == ["teacher:sharded"]


def put_others_into(folder: Path) -> set[Path]:
    """A weight-sync folder and a file of somebody's, one of them in a folder of the checkpoint;
    returns all that must stay."""
    version = folder / ".hf.v1"
    version.mkdir()
    (version / "model.safetensors").write_text("weights")
    (folder / "hf").symlink_to(".hf.v1")
    (folder / "huggingface" / "notes.txt").write_text("mine")
    return {
        folder / "hf",
        version,
        version / "model.safetensors",
        folder / "huggingface",
        folder / "huggingface/notes.txt",
    }


def test_removing_the_previous_one_leaves_what_others_put_into_its_folder(saves: Saves) -> None:
    """Only what its manifest lists goes; a weight-sync folder inside is never what a full save
    removes."""
    path = saves("step_1")
    others = put_others_into(path)
    saves("step_2")
    assert saves.left() == {"step_2"}
    assert (
        set(path.rglob("*")) == others
        and (path / "hf" / "model.safetensors").read_text() == "weights"
    )


def test_a_folder_that_others_use_is_not_replaced(tmp_path: Path) -> None:
    """The refusal names what is in the way; the former checkpoint and all else stay."""
    first = make_request(tmp_path, tmp_path / "z", OLD)
    publish(first, lambda: None)
    folder = Path(first.path)
    put_others_into(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    request = make_request(tmp_path, tmp_path / "z", NEW)
    with pytest.raises(
        ServiceError,
        match=r"PATH_REFUSED.*\(\.hf\.v1, hf, huggingface/notes\.txt\); choose another path",
    ):
        publish(request, lambda: None)
    assert {
        path: path.read_bytes() for path in Path(first.path).rglob("*") if path.is_file()
    } == before
    assert loads(Path(first.path), OLD) and not list(tmp_path.glob(".z*"))


def test_what_comes_while_a_checkpoint_is_prepared_stays(tmp_path: Path) -> None:
    """The destination is looked at again just before the swap."""
    publish(make_request(tmp_path, tmp_path / "z", OLD), lambda: None)
    with pytest.raises(ServiceError, match=r"notes\.txt"):
        publish(
            make_request(tmp_path, tmp_path / "z", NEW),
            lambda: put_others_into(tmp_path / "z") and None,
        )
    assert loads(tmp_path / "z", OLD) and (tmp_path / "z" / "hf").is_symlink()


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed-after-the-swap"])
def test_what_comes_in_the_moment_of_the_swap_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """It is found at its place, in the new checkpoint; the next attempt puts it there if this one
    is killed."""
    exchange = durable._exchange

    def others_first(left: Path, right: Path) -> bool:
        put_others_into(right)
        swapped = exchange(left, right)
        if killed:
            raise KeyboardInterrupt
        return swapped

    publish(make_request(tmp_path, tmp_path / "z", OLD), lambda: None)
    monkeypatch.setattr(durable, "_exchange", others_first)
    request = make_request(tmp_path, tmp_path / "z", NEW)
    with pytest.raises(KeyboardInterrupt) if killed else contextlib.nullcontext():
        publish(request, lambda: None)
    publish(request.model_copy(update={"attempt": 2}), lambda: None)
    assert (
        loads(tmp_path / "z", NEW)
        and (tmp_path / "z" / "hf" / "model.safetensors").read_text() == "weights"
    )
    assert (tmp_path / "z" / "huggingface" / "notes.txt").read_text() == "mine" and not list(
        tmp_path.glob(".z*")
    )


def test_nothing_is_removed_through_a_link(saves: Saves) -> None:
    """A folder of the checkpoint that became a link to elsewhere: what is there stays."""
    path = saves("step_1")
    elsewhere = saves.data / "elsewhere"
    shutil.move(path / "huggingface", elsewhere)
    (path / "huggingface").symlink_to(elsewhere)
    saves("step_2")
    assert (elsewhere / "config.json").is_file() and (path / "huggingface").is_symlink()


def test_the_checkpoint_of_another_group_is_not_replaced(tmp_path: Path) -> None:
    """The refusal names the other group, before anything is written beside it."""
    publish(make_request(tmp_path, tmp_path / "latest", OLD), lambda: None)
    request = make_request(tmp_path, tmp_path / "latest", NEW, identifier="teacher")
    with pytest.raises(
        ServiceError, match=r"PATH_REFUSED.*of group 'student'; choose another path, or remove it"
    ):
        publish(request, lambda: None)
    assert (
        loads(tmp_path / "latest", OLD)
        and request.staging.is_dir()
        and not list(tmp_path.glob(".latest*"))
    )
