"""What only the store in Redis promises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore, open_store

from tests.helpers.payloads import checksum, frame, send_part, some_bytes


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A look at the store from outside."""
    with redis.Redis.from_url(redis_url) as found:
        yield found


def bytes_sent(client: redis.Redis) -> int:
    """Bytes that the server has sent to anybody."""
    return int(client.info("stats")["total_net_output_bytes"])


def test_ranks_read_the_batch_once(redis_store: PayloadStore, client: redis.Redis) -> None:
    """Four ranks that each read their rows move 1.02 times the batch together, and a rank that
    skips tensors less."""
    batch = {name: np.full((64, 8192), number) for number, name in enumerate("abc")} | {
        "d": np.ones((64, 8192), bool)
    }
    data = frame(batch)
    redis_store.put("a", [data])
    before = bytes_sent(client)
    for rank in range(4):
        with redis_store.open("a") as payload:
            for name in "abcd":
                mine = payload.torch(name, slice(rank * 16, rank * 16 + 16)).numpy()
                assert np.array_equal(mine, batch[name][rank * 16 : rank * 16 + 16])
    assert len(data) < bytes_sent(client) - before < 1.02 * len(data)
    before = bytes_sent(client)
    with redis_store.open("a") as payload:
        payload.torch("d", [1, 2, 3, 40]).numpy()
    assert bytes_sent(client) - before < 4 * 8192 + 20_000


def test_keys_have_a_life_and_values_are_small(
    redis_store: PayloadStore, client: redis.Redis
) -> None:
    """At every moment, in mid-upload and after mismatches too, every key has a TTL and no value
    exceeds 2 MiB."""
    unfinished = redis_store.create("a")
    unfinished.write(some_bytes(5_000_000))
    part = redis_store.put_part("b", 7)
    part.write(some_bytes(5_000_000))
    redis_store.put("c.result", [some_bytes(9_000_000)])
    for n in range(3):
        send_part(redis_store, "d", n, some_bytes(3_000_000, n))
    redis_store.assemble("d", 3)
    redis_store.check()
    keys = client.keys()
    assert len(keys) > 15
    for key in keys:
        assert client.pttl(key) > 0, key
        if client.type(key) == b"string":
            assert client.strlen(key) <= 2 * 1024 * 1024


def test_aborted_uploads_leave_no_keys(redis_store: PayloadStore, client: redis.Redis) -> None:
    """What is aborted or refused is removed at once, not when its TTL ends."""
    with redis_store.create("a") as upload:
        upload.write(some_bytes(5_000_000))
    with pytest.raises(ServiceError):
        send_part(redis_store, "b", 0, some_bytes(5_000_000), claimed=checksum(b""))
    assert client.keys() == []
    send_part(redis_store, "c", 0, some_bytes(5_000_000))
    keys = sorted(client.keys())
    send_part(redis_store, "c", 0, some_bytes(5_000_000))
    assert sorted(client.keys()) == keys


def test_leases_are_renewed(redis_store: PayloadStore, client: redis.Redis) -> None:
    """A sweep that finds the payload in use begins the life of all its keys again."""
    send_part(redis_store, "a", 0, some_bytes(5_000_000))
    redis_store.assemble("a", 1)
    for key in client.scan_iter():
        client.expire(key, 100)
    redis_store.sweep({"a"}, result_age_s=1, upload_age_s=1)
    assert min(client.ttl(key) for key in client.scan_iter()) > 24 * 3600


def test_repeated_puts_leave_no_orphans(redis_store: PayloadStore, client: redis.Redis) -> None:
    """A result written twice by a restarted rank: the sweep removes the first one's chunks and
    keeps the second."""
    redis_store.put("a.result", [b"x" * 5_000_000])
    old = set(client.keys("*:a.result:*"))
    redis_store.put("a.result", [b"y" * 5_000_000])
    for key in old:
        client.expire(key, 100)
    redis_store.sweep(set(), result_age_s=24 * 3600, upload_age_s=3600)
    assert old.isdisjoint(client.keys())
    assert set(b"".join(redis_store.stream("a.result"))) == set(b"y")


def test_memory_is_kept_between_payloads(redis_store: PayloadStore) -> None:
    """The next payload is read into the same memory, unless a tensor of the last one still
    lives."""
    data = frame({"x": np.ones(1_000_000)})
    redis_store.put("a", [data])
    addresses = []
    for _ in range(3):
        with redis_store.open("a") as payload:
            x = payload.torch("x")
        addresses.append(x.data_ptr())
        if len(addresses) == 1:
            del x
    assert addresses[0] == addresses[1]
    assert addresses[1] != addresses[2]


def test_rows_read_again_and_again(redis_store: PayloadStore) -> None:
    """Reading the same tensor more often than the payload has bytes gives sound, separate
    tensors."""
    redis_store.put("a", [frame({"x": np.arange(1_000_000)})])
    with redis_store.open("a") as payload:
        copies = [payload.torch("x").numpy() for _ in range(4)]
        copies[0][:] = 0
        assert all(int(copy[-1]) == 999_999 for copy in copies[1:])


def test_a_lost_chunk(redis_store: PayloadStore, client: redis.Redis) -> None:
    """A payload of which a chunk is gone is not there, rather than wrong; the store goes on to
    work."""
    redis_store.put("a", [frame({"x": np.arange(1_000_000)})])
    client.delete(*client.keys("*:1"))
    with redis_store.open("a") as payload, pytest.raises(ServiceError) as error:
        payload.torch("x").numpy()
    assert error.value.code == "PAYLOAD_NOT_FOUND"
    with pytest.raises(ServiceError):
        list(redis_store.stream("a"))
    redis_store.put("a", [frame({"x": np.arange(1_000_000)})])
    with redis_store.open("a") as payload:
        assert int(payload.torch("x").numpy()[-1]) == 999_999


def _as_list(client: redis.Redis, key: bytes) -> None:
    client.delete(key)
    client.lpush(key, "x")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda client, key: client.set(key, b"x" * 5), "PAYLOAD_NOT_FOUND"),
        (lambda client, key: client.set(key, b""), "PAYLOAD_NOT_FOUND"),
        (_as_list, "STORE_UNAVAILABLE"),
    ],
    ids=["shorter", "empty", "of another kind"],
)
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_a_spoilt_chunk(
    chunk: int,
    spoil: Callable[[redis.Redis, bytes], None],
    code: str,
    redis_store: PayloadStore,
    client: redis.Redis,
) -> None:
    """Whatever stands where a chunk should is refused at once, and the next read is not confused by
    it."""
    data = frame({"x": np.arange(1_000_000)})
    redis_store.put("sound", [data])
    redis_store.put("a", [data])
    start = time.monotonic()
    payload = redis_store.open("a")
    spoil(client, client.keys(f"*:a:*:{chunk}")[0])
    with pytest.raises(ServiceError) as error:
        payload.torch("x").numpy()
    assert error.value.code == code
    assert time.monotonic() - start < 5
    for _ in range(3):
        with redis_store.open("sound") as sound:
            assert np.array_equal(sound.torch("x").numpy(), np.arange(1_000_000))


def test_a_writer_may_use_its_memory_again(redis_store: PayloadStore) -> None:
    """What was written stays as it was, though the caller overwrites its buffer while Redis still
    stores it."""
    kept = bytearray(2 * 1024 * 1024)
    with redis_store.create("a") as upload:
        for number in range(6):
            kept[:] = bytes([number]) * len(kept)
            upload.write(kept)
        upload.commit()
    stored = b"".join(redis_store.stream("a"))
    assert stored == b"".join(bytes([number]) * len(kept) for number in range(6))


def test_no_memory_left(redis_store: PayloadStore, client: redis.Redis) -> None:
    """A Redis at its limit is NO_SPACE, and what was sent so far is removed."""
    client.config_set("maxmemory", client.info("memory")["used_memory"] + (5 << 20))
    try:
        with pytest.raises(ServiceError) as error:
            redis_store.put("a", [some_bytes(20 << 20)])
        assert error.value.code == "NO_SPACE"
        assert client.keys() == []
    finally:
        client.config_set("maxmemory", 0)


def test_redis_away(tmp_path: Path) -> None:
    """Without a server every method says STORE_UNAVAILABLE, soon."""
    store = open_store(f"unix://{tmp_path}/nobody.sock")
    ways = (
        store.check,
        lambda: store.put("a", [b"x"]),
        lambda: store.open("a"),
        lambda: store.put_part("a", 0),
        lambda: store.sweep(set(), result_age_s=0, upload_age_s=0),
    )
    for way in ways:
        with pytest.raises(ServiceError) as error:
            way()
        assert error.value.code == "STORE_UNAVAILABLE"
