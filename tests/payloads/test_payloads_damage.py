"""One flipped bit in a stored payload: whoever opened it with its checksum gets an error that names
the place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redis
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore
from nexrl_payloads.checks import BLOCK
from nexrl_payloads.file_store import FileStore
from nexrl_payloads.redis_records import CHUNK_BYTES
from tensor_codec import encode, parse_header

from tests.helpers.payloads import send_part

Flip = Callable[[str, int], None]
ROWS, COLUMNS = 64, 1024
BATCH = {
    "input_ids": np.arange(ROWS * COLUMNS, dtype=np.int64).reshape(ROWS, COLUMNS),
    "mask": np.ones((ROWS, COLUMNS), dtype=np.bool_),
    "advantages": np.arange(ROWS, dtype=np.float32),
}
FRAME = encode(BATCH, {"note": "x" * 100}).tobytes()
HEADER = parse_header(FRAME)
MIDDLE = ROWS // 2


@pytest.fixture
def flip(request: pytest.FixtureRequest, store: PayloadStore, folder: Path) -> Flip:
    """flip(id, offset) turns the lowest bit of one stored byte."""

    def in_file(payload_id: str, offset: int) -> None:
        descriptor = os.open(folder / payload_id, os.O_RDWR)
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, offset)[0] ^ 1]), offset)
        os.close(descriptor)

    def in_redis(payload_id: str, offset: int) -> None:
        with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
            found = sorted(client.scan_iter(match=f"nexrl:payload:{payload_id}:*:[0-9]*"))
            key = found[offset // CHUNK_BYTES]
            byte = client.getrange(key, offset % CHUNK_BYTES, offset % CHUNK_BYTES)
            client.setrange(key, offset % CHUNK_BYTES, bytes([byte[0] ^ 1]))

    return in_file if isinstance(store, FileStore) else in_redis


def read_rows(store: PayloadStore, checksum: str, rows: slice | list[int]) -> dict[str, np.ndarray]:
    with store.open("a", checksum) as payload:
        for name in BATCH:
            payload.check(name, rows)
        return {name: payload.torch(name, rows).numpy().copy() for name in BATCH}


def place_of(name: str, row: int, byte: int = 0) -> int:
    """The offset of a byte of a row in the frame."""
    info = HEADER.tensors[name]
    return HEADER.data_start + info.start + row * (info.nbytes // ROWS) + byte


@pytest.mark.parametrize(
    "rows", [slice(0, ROWS), slice(3, 40), [0, 5, 6, 63], [9, 2], slice(0, 0), []]
)
def test_sound_rows_are_what_was_stored(store: PayloadStore, rows: slice | list[int]) -> None:
    """Whatever rows are asked for, in blocks that they share with other rows or have for
    themselves."""
    found = read_rows(store, store.put("a", [FRAME]).checksum, rows)
    for name, tensor in BATCH.items():
        np.testing.assert_array_equal(found[name], tensor[rows])


@pytest.mark.parametrize("name", BATCH)
@pytest.mark.parametrize("row", [0, MIDDLE, ROWS - 1])
def test_a_flipped_bit_is_found_in_every_tensor(
    store: PayloadStore, flip: Flip, name: str, row: int
) -> None:
    """In its first row, in its last one, and between; the error names tensor and rows."""
    checksum = store.put("a", [FRAME]).checksum
    flip("a", place_of(name, row))
    for rows in (slice(0, ROWS), [row]):
        with pytest.raises(ServiceError) as error:
            read_rows(store, checksum, rows)
        assert error.value.code == "PAYLOAD_DAMAGED"
        first = place_of(name, row) < BLOCK  # beside the header
        assert (
            "the header or the rows behind it" if first else f"tensor {name} row"
        ) in error.value.message
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED"):
        list(store.stream("a", checksum))


@pytest.mark.parametrize("offset", [0, 3, 8, 60, HEADER.data_start - 1])
def test_a_flipped_bit_is_found_in_the_header(store: PayloadStore, flip: Flip, offset: int) -> None:
    """Its length, its text, and the metadata in it: nothing is read by a header that is not the one
    that was sent."""
    checksum = store.put("a", [FRAME]).checksum
    flip("a", offset)
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED: the header or the rows behind it"):
        store.open("a", checksum)


@pytest.mark.parametrize("offset", [BLOCK - 1, BLOCK, 2 * BLOCK - 1, len(FRAME) - 1])
def test_a_flipped_bit_is_found_at_the_borders_of_blocks(
    store: PayloadStore, flip: Flip, offset: int
) -> None:
    checksum = store.put("a", [FRAME]).checksum
    flip("a", offset)
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED"):
        read_rows(store, checksum, slice(0, ROWS))


def test_other_rows_are_not_read_for_it(store: PayloadStore, flip: Flip) -> None:
    """A reader compares the blocks of its own rows: what is damaged far from them is another
    reader's to find."""
    checksum = store.put("a", [FRAME]).checksum
    flip("a", place_of("input_ids", 60))
    with store.open("a", checksum) as payload:
        np.testing.assert_array_equal(
            payload.torch("input_ids", slice(0, 30)).numpy(), BATCH["input_ids"][:30]
        )
        with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED: tensor input_ids rows 5"):
            payload.torch("input_ids", slice(30, 64)).numpy()


@pytest.mark.parametrize("offset", [0, place_of("input_ids", 1), 300_000, len(FRAME) - 1])
def test_parts_have_checksums_too(store: PayloadStore, flip: Flip, offset: int) -> None:
    """Parts of odd sizes, whose borders are not those of blocks, in any order."""
    cuts = [0, 100_001, 250_000, len(FRAME)]
    for n in (2, 0, 1):
        send_part(store, "a", n, FRAME[cuts[n] : cuts[n + 1]])
    checksum = store.assemble("a", 3).checksum
    found = read_rows(store, checksum, [0, 7, 8, 63])
    np.testing.assert_array_equal(found["input_ids"], BATCH["input_ids"][[0, 7, 8, 63]])
    assert b"".join(store.stream("a", checksum)) == FRAME
    if not isinstance(store, FileStore):
        return  # which chunk belongs to which part is Redis' own matter
    flip("a", offset)
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED"):
        read_rows(store, checksum, slice(0, ROWS))


def test_another_payload_in_its_place_is_refused(store: PayloadStore) -> None:
    """What names the payload says which bytes are meant, not only that they are sound."""
    checksum = store.put("a", [FRAME]).checksum
    store.put("a", [encode({**BATCH, "advantages": BATCH["advantages"] + 1}).tobytes()])
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED"):
        store.open("a", checksum)
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED"):
        store.stream("a", checksum)


def test_a_file_cut_short_or_without_checksums_is_refused(
    file_store: PayloadStore, folder: Path
) -> None:
    checksum = file_store.put("a", [FRAME]).checksum
    os.truncate(folder / "a", len(FRAME) - 8)
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED: the length"):
        file_store.open("a", checksum)
    file_store.put("a", [FRAME])
    (folder / ".sums-a").unlink()
    with pytest.raises(ServiceError, match="PAYLOAD_DAMAGED: the checksums"):
        file_store.open("a", checksum)


def test_checksums_go_with_their_payload(file_store: PayloadStore, folder: Path) -> None:
    """Deleted, swept or never followed by it, they leave nothing behind; what is in use keeps
    them."""
    for name in ("deleted", "swept", "kept"):
        file_store.put(name, [FRAME])
    file_store.delete("deleted")
    (folder / ".sums-lonely").write_bytes(b"")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    file_store.sweep({"kept"}, result_age_s=1000, upload_age_s=1000)
    assert sorted(path.name for path in folder.iterdir()) == [".sums-kept", "kept"]
