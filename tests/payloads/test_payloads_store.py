"""What both stores promise for whole payloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensor_codec
import torch
from nexrl_contract.errors import ServiceError
from nexrl_payloads import PayloadStore, open_store

from tests.helpers.payloads import frame, some_batch, some_bytes, url_of

EVIL_IDS = [
    "",
    ".",
    "..",
    ".hidden",
    "../x",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "a\0b",
    "a" * 81,
    "é",
    "a\n",
    "a:b",
    "*",
]


def code_of(error: pytest.ExceptionInfo[ServiceError]) -> str:
    return error.value.code


@pytest.mark.parametrize("nbytes", [0, 1, 2 * 1024 * 1024, 5_000_001])
def test_what_was_written_is_streamed_back(store: PayloadStore, nbytes: int) -> None:
    """Chunks of any size come back as the same bytes, in pieces of at most 1 MiB, with length and
    checksum."""
    data = some_bytes(nbytes)
    with store.create("a", nbytes) as upload:
        for start in range(0, nbytes, 700_001):
            upload.write(
                data[start : start + 350_000], memoryview(data)[start + 350_000 : start + 700_001]
            )
        ref = upload.commit()
    pieces = list(store.stream("a"))
    assert b"".join(pieces) == data
    assert all(len(piece) <= 1024 * 1024 for piece in pieces)
    assert (ref.id, ref.nbytes) == ("a", nbytes)
    assert store.nbytes("a") == nbytes
    assert b"".join(store.stream("a", ref.checksum)) == data
    assert store.put("b", [data]).checksum == ref.checksum != store.put("c", [data, b"x"]).checksum


def test_a_result_is_put_from_views(store: PayloadStore) -> None:
    """A rank puts tensor_codec's Encoded as it is."""
    encoded = tensor_codec.encode(
        {"log_probs": torch.arange(3_000_000, dtype=torch.float32).reshape(3, -1)}
    )
    ref = store.put("j.result", encoded)
    assert b"".join(store.stream("j.result", ref.checksum)) == encoded.tobytes()


def test_the_header_is_read_without_tensors(store: PayloadStore) -> None:
    """Names, dtypes, shapes and metadata are there before any tensor is read."""
    data = frame(some_batch())
    store.put("a", [data])
    with store.open("a") as payload:
        assert payload.nbytes == len(data)
        assert payload.header.tensors["input_ids"].shape == (16, 1000)
        assert payload.header.metadata == {"nexrl": "{}"}


def test_a_header_longer_than_one_read(store: PayloadStore) -> None:
    """Hundreds of tensors with long names, whose header takes several kilobytes, open like any."""
    batch = {f"{'name' * 30}{number}": np.full(2, number) for number in range(300)}
    store.put("a", [frame(batch)])
    with store.open("a") as payload:
        assert len(payload.header.tensors) == 300
        assert payload.torch(f"{'name' * 30}299").numpy().tolist() == [299, 299]


@pytest.mark.parametrize(
    "rows", [None, slice(4, 9), slice(1, None, 3), slice(3, 3), [5, 6, 7, 2, 2], []]
)
def test_rows_are_those_of_the_batch(store: PayloadStore, rows: slice | list[int] | None) -> None:
    """A slice or a list of rows gives the same values, dtype and shape as the array that was
    sent."""
    batch = some_batch()
    store.put("a", [frame(batch)])
    with store.open("a") as payload:
        for name, sent in batch.items():
            if sent.ndim == 0:
                assert payload.torch(name).item() == sent.item()
                continue
            wanted = (
                sent
                if rows is None
                else sent[np.array(rows, int) if isinstance(rows, list) else rows]
            )
            got = payload.torch(name, rows).numpy()
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)


def test_rows_across_chunks(store: PayloadStore) -> None:
    """Rows that cross the 2 MiB bounds of Redis' chunks are whole."""
    big = np.arange(9 * 130_001).reshape(9, -1)
    store.put("a", [frame({"big": big})])
    with store.open("a") as payload:
        assert np.array_equal(payload.torch("big", slice(1, 8)).numpy(), big[1:8])


def test_bad_rows_and_names(store: PayloadStore) -> None:
    """Rows and tensors that are not there are refused alike by both stores, and so is reading after
    close."""
    store.put("a", [frame(some_batch())])
    with store.open("a") as payload:
        for rows in ([16], [-1], slice(5, 1, -1)):
            with pytest.raises(tensor_codec.InvalidRows):
                payload.torch("input_ids", rows)
        with pytest.raises(tensor_codec.InvalidRows):
            payload.torch("scale", [0])
        with pytest.raises(tensor_codec.UnknownTensor):
            payload.torch("nothing")
    with pytest.raises(tensor_codec.FrameClosed):
        payload.torch("input_ids")


def test_tensors_outlive_their_payload(store: PayloadStore) -> None:
    """A tensor keeps its values after close, delete and the next payload: memory in view is not
    reused."""
    ones, twos = frame({"x": np.ones(1_000_000)}), frame({"x": np.full(1_000_000, 2.0)})
    store.put("a", [ones])
    store.put("b", [twos])
    with store.open("a") as payload:
        kept = payload.torch("x")
    store.delete("a")
    with store.open("b") as payload:
        assert payload.torch("x").sum() == 2_000_000
    assert kept.sum() == 1_000_000


def test_what_is_no_frame(store: PayloadStore) -> None:
    """Bytes that are no frame, and a truncated frame, are MALFORMED when opened."""
    for data in (b"", b"x", b"x" * 100, frame(some_batch())[:-1]):
        store.put("a", [data])
        with pytest.raises(ServiceError) as error:
            store.open("a")
        assert code_of(error) == "MALFORMED"


def test_what_is_not_there(store: PayloadStore) -> None:
    """Every way to read a payload that is gone says PAYLOAD_NOT_FOUND; deleting it again is
    fine."""
    store.put("a", [b"x"])
    store.delete("a")
    store.delete("a")
    for way in ("open", "stream", "nbytes"):
        with pytest.raises(ServiceError) as error:
            getattr(store, way)("a")
        assert code_of(error) == "PAYLOAD_NOT_FOUND"
    assert store.parts("a") == []


@pytest.mark.parametrize("payload_id", EVIL_IDS)
def test_evil_ids(store: PayloadStore, payload_id: str) -> None:
    """An id that could lead out of the store, or clash with its own files, is refused by every
    method."""
    for way in ("create", "open", "stream", "nbytes", "delete", "parts"):
        with pytest.raises(ServiceError) as error:
            getattr(store, way)(payload_id)
        assert code_of(error) == "INVALID_ARGUMENT"
    with pytest.raises(ServiceError):
        store.put_part(payload_id, 0)
    with pytest.raises(ServiceError):
        store.assemble(payload_id, 1)


def test_announced_length(store: PayloadStore) -> None:
    """A body shorter or longer than announced is MALFORMED, and no payload."""
    for data in (b"123", b"12345"):
        with pytest.raises(ServiceError) as error, store.create("a", 4) as upload:
            upload.write(data)
            upload.commit()
        assert code_of(error) == "MALFORMED"
    with pytest.raises(ServiceError):
        store.nbytes("a")


def test_an_abandoned_upload_is_no_payload(store: PayloadStore) -> None:
    """Without a commit nothing can be read, and what was there before stays."""
    store.put("a", [b"old"])
    with store.create("a") as upload:
        upload.write(some_bytes(3_000_000))
    assert b"".join(store.stream("a")) == b"old"


def test_check_is_quiet(store: PayloadStore) -> None:
    """A working store passes its check, and the check leaves nothing to sweep."""
    store.check()
    assert store.sweep(set(), result_age_s=0, upload_age_s=0) == []


@pytest.mark.parametrize("url", ["s3://x/y", "file://relative/dir", "file:", "/tmp/x", ""])
def test_unknown_urls(url: str) -> None:
    """A store that does not exist is named at once."""
    with pytest.raises(ServiceError) as error:
        open_store(url)
    assert code_of(error) == "INVALID_ARGUMENT"


def test_a_gateway_loads_neither_torch_nor_numpy_nor_redis() -> None:
    """Importing the package and opening a folder loads nothing heavy."""
    script = (
        "import sys, nexrl_payloads.file_store; sys.exit(bool({'torch', 'numpy', 'redis'} & "
        "set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


STREAMER = """
import sys
from nexrl_payloads import open_store
store, chunk = open_store(sys.argv[1]), bytes(1 << 20)

def send(mebibytes):
    with store.create("a", mebibytes << 20) as upload:
        for _ in range(mebibytes):
            upload.write(chunk)
        upload.commit()
    # The rusage of a process counts what its parent held when it was started; this does not.
    status = open("/proc/self/status")
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1])

before = send(8)
print((send(128) - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_gateway_does_not_grow_with_the_batch(
    kind: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    """An upload that is 120 MiB longer takes no more memory."""
    url = url_of(folder) if kind == "file" else request.getfixturevalue("redis_url")
    done = subprocess.run(
        [sys.executable, "-c", STREAMER, url], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4 << 20
