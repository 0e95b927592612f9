"""One bit of a queued batch, flipped in the store: real gateway, ledger and consumers refuse it and
go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from nexrl_client import JobHandle, PayloadDamaged

from benchmarks.batches import Size, make_batch
from benchmarks.processes import Children
from benchmarks.service_path import ServicePath, Store, folder_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While nothing of the process runs, what is queued for it stays so."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def flip(path: ServicePath, job: JobHandle, place: Callable[[int], int]) -> None:
    """The lowest bit of one byte of the job's stored batch; ``place`` says which, from their
    number."""
    if path.payload_redis is None:
        data = bytearray((file := folder_of(path) / job.id).read_bytes())
        data[place(len(data))] ^= 1
        with file.open("r+b") as opened:  # in place: a stopped rank may have it mapped
            opened.write(data)
        return
    with redis.Redis.from_url(path.payload_redis) as client:
        (key,) = client.scan_iter(match=f"nexrl:payload:{job.id}:*:0")
        at = place(int(client.strlen(key)))
        client.setrange(key, at, bytes([client.getrange(key, at, at)[0] ^ 1]))


@pytest.mark.parametrize(("store", "ranks"), [("file", 1), ("redis", 2)])
def test_a_flipped_bit_fails_the_job_and_not_the_group(
    tmp_path: Path, store: Store, ranks: int
) -> None:
    """In the header, in the first row, in the middle and in the last byte; of two ranks one may
    read it and both refuse."""
    with Children(tmp_path) as children:
        path = ServicePath(children, "damage", store, ranks, "update")
        client, batch = path.client(), make_batch(Size(64, 512))
        sound = client.update_actor(batch)["metrics"]["scored"]
        for place in (
            lambda size: 30,
            lambda size: 3000,
            lambda size: size // 2,
            lambda size: size - 1,
        ):
            with stopped(path.ranks[0].pid):
                job = client.submit("update_actor", batch)
                flip(path, job, place)
            with pytest.raises(PayloadDamaged, match=r"header|tensor \w+ row"):
                job.result(60)
        assert client.update_actor(batch)["metrics"]["scored"] == sound
