"""Nothing leaks, nothing in use is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore

from tests.helpers.payloads import send_part, some_bytes, url_of

UPLOADER = """
import sys
from nexrl_payloads import open_store
store = open_store(sys.argv[1])
tail, aside, whole = store.put_part("a", 1), store.put_part("a", 5), store.create("b", 9_000_000)
for upload in (tail, aside, whole):
    upload.write(bytes(3_000_000))
print("writing", flush=True)
sys.stdin.read()
"""


def kill_in_mid_upload(url: str) -> None:
    """Kill a process while it writes a payload, a part in its turn and one before its turn."""
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOADER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(params=["file", "redis"])
def store_and_url(request: pytest.FixtureRequest, folder: Path) -> tuple[PayloadStore, str]:
    """Each store with its URL."""
    store: PayloadStore = request.getfixturevalue(f"{request.param}_store")
    return store, url_of(folder) if request.param == "file" else request.getfixturevalue(
        "redis_url"
    )


def traces(url: str) -> list[str]:
    """All that a store still holds."""
    if url.startswith("file://"):
        return sorted(os.listdir(url.removeprefix("file://")))
    with redis.Redis.from_url(url) as client:
        return sorted(key.decode() for key in client.scan_iter())


def test_killed_uploads_go_with_the_sweep(store_and_url: tuple[PayloadStore, str]) -> None:
    """A killed gateway leaves no payload and no part; the sweep, not before their age, leaves
    nothing of it at all."""
    store, url = store_and_url
    send_part(store, "a", 0, b"sound")
    kill_in_mid_upload(url)
    assert store.parts("a") == [0]
    with pytest.raises(ServiceError):
        store.nbytes("b")
    assert store.sweep(set(), result_age_s=3600, upload_age_s=3600) == []
    assert store.parts("a") == [0]
    assert store.sweep(set(), result_age_s=0, upload_age_s=0) == ["a", "b"]
    assert traces(url) == []


def test_a_killed_upload_does_not_disturb_the_next(store_and_url: tuple[PayloadStore, str]) -> None:
    """After a kill another gateway takes the same parts, and the payload is whole."""
    store, url = store_and_url
    send_part(store, "a", 0, b"first")
    kill_in_mid_upload(url)
    send_part(store, "a", 1, b"second")
    store.assemble("a", 2)
    assert b"".join(store.stream("a")) == b"firstsecond"


def test_what_is_in_use_stays(store_and_url: tuple[PayloadStore, str]) -> None:
    """Payloads, parts and results of ids in use stay at any age; all others go."""
    store, url = store_and_url
    for payload_id in ("used", "unused", "used.result", "unused.result"):
        store.put(payload_id, [some_bytes(10)])
    send_part(store, "parts-in-use", 0, b"x")
    send_part(store, "parts-of-nobody", 1, b"x")
    in_use = {"used", "used.result", "parts-in-use"}
    gone = store.sweep(in_use, result_age_s=0, upload_age_s=0)
    assert gone == ["parts-of-nobody", "unused", "unused.result"]
    assert store.nbytes("used") == store.nbytes("used.result") == 10
    assert store.parts("parts-in-use") == [0]
    store.sweep(set(), result_age_s=0, upload_age_s=0)
    assert traces(url) == []


def test_results_live_longer(store_and_url: tuple[PayloadStore, str]) -> None:
    """Results go by their own age."""
    store, _ = store_and_url
    for payload_id in ("batch", "job.result"):
        store.put(payload_id, [b"x"])
    time.sleep(1.6)
    store.put("young", [b"x"])
    assert store.sweep(set(), result_age_s=3600, upload_age_s=1.5) == ["batch"]
    assert store.nbytes("job.result") == store.nbytes("young") == 1
    assert store.sweep(set(), result_age_s=1.5, upload_age_s=3600) == ["job.result"]


def test_delete_leaves_nothing(store_and_url: tuple[PayloadStore, str]) -> None:
    """Deleting removes the payload, its parts and those that still wait."""
    store, url = store_and_url
    send_part(store, "a", 0, some_bytes(3_000_000))
    send_part(store, "a", 2, some_bytes(3_000_000))
    send_part(store, "a", 1, b"x")
    store.assemble("a", 3)
    send_part(store, "b", 4, b"waits")
    for payload_id in ("a", "b"):
        store.delete(payload_id)
    assert traces(url) == []


def test_strangers_stay(file_store: PayloadStore, folder: Path) -> None:
    """Files of the folder that are none of the store's are left alone."""
    (folder / ".nfs0001").write_bytes(b"x")
    (folder / "subfolder").mkdir()
    file_store.sweep(set(), result_age_s=0, upload_age_s=0)
    assert sorted(os.listdir(folder)) == [".nfs0001", "subfolder"]
