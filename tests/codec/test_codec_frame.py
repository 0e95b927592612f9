"""Frame: views, rows, mapping, and how long memory lives."""

from __future__ import annotations

import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensor_codec import encode, open_frame, wrap

ROWS, COLUMNS = 512, 8192


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 32 MiB of int64 (row r holds r) and a small bf16 tensor."""
    file = tmp_path / "batch"
    ids = np.repeat(np.arange(ROWS, dtype=np.int64)[:, None], COLUMNS, axis=1)
    with open(file, "wb") as out:
        out.writelines(encode({"ids": ids, "half": torch.arange(12.0).reshape(4, 3).bfloat16()}))
    return file


def resident(path: Path) -> int:
    """Bytes of this process's mapping of the file that are in memory for it (Linux's smaps)."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            total += int(line.split()[1]) * 1024 if inside and line.startswith("Rss:") else 0
        else:
            inside = line.endswith(str(path))
    return total


def mapped(path: Path) -> bool:
    """Whether this process maps the file."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
@pytest.mark.parametrize("rows", [slice(100, 108), [3, 200, 500]], ids=["slice", "list"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rows_of_a_file_touch_only_these_rows(path: Path, rows: object, library: str) -> None:
    """8 rows of 512, or 3 scattered ones: their pages come in, and at most what one fault maps
    around each place."""
    expected, places = (range(100, 108), 1) if isinstance(rows, slice) else (rows, 3)
    with open_frame(path) as frame:
        part = getattr(frame, library)("ids", rows)
        assert part.sum() == sum(expected) * COLUMNS  # type: ignore[call-overload]
        # The header is a place too. A fault maps 64 KiB around, or a folio of up to 2 MiB.
        assert 0 < resident(path) <= part.nbytes + (places + 1) * (2 << 20) + 65536 * places
        assert frame.numpy("ids").sum() == ROWS * (ROWS - 1) // 2 * COLUMNS
        assert resident(path) > 0.9 * ROWS * COLUMNS * 8  # the measure itself can see


def test_slices_are_views_at_the_rows_offset(path: Path) -> None:
    """A slice's memory starts where its first row lies in the whole tensor."""
    with open_frame(path) as frame:
        row = COLUMNS * 8
        assert frame.torch("ids", slice(7, 9)).data_ptr() == frame.torch("ids").data_ptr() + 7 * row
        whole, part = frame.numpy("ids"), frame.numpy("ids", slice(7, None, 3))
        assert part.ctypes.data == whole.ctypes.data + 7 * row and part.strides[0] == 3 * row
        assert np.shares_memory(whole, part) and not np.shares_memory(
            whole, frame.numpy("ids", [7])
        )
        assert frame.torch("ids").data_ptr() == whole.ctypes.data


@pytest.mark.parametrize(
    "rows",
    [
        None,
        slice(1, 3),
        slice(None, None, 2),
        slice(3, 1),
        slice(-2, 99),
        [],
        [3, 0, 0],
        range(1, 3),
        np.array([2]),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 0), (4, 1, 2)])
def test_rows_mean_what_indexing_means(rows: object, shape: tuple[int, ...]) -> None:
    """numpy(), torch() and both kinds of buffer give what indexing the original gives, for any
    rank."""
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    expected = array[
        slice(None) if rows is None else rows if isinstance(rows, slice) else list(rows)
    ]  # type: ignore[call-overload]
    data = encode({"x": array, "half": torch.from_numpy(array).bfloat16()}).tobytes()
    for frame in (wrap(data), wrap(bytearray(data))):
        np.testing.assert_array_equal(frame.numpy("x", rows), expected, strict=True)  # type: ignore[arg-type]
        assert torch.equal(frame.torch("x", rows), torch.from_numpy(expected.copy()))  # type: ignore[arg-type]
        assert torch.equal(frame.torch("half", rows), torch.from_numpy(expected.copy()).bfloat16())  # type: ignore[arg-type]


def test_no_warning_and_the_file_is_never_written(path: Path) -> None:
    """Tensors of a mapped file and of bytes are writable without a warning; file and bytes stay as
    they were."""
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_frame(path) as frame, wrap(before) as wrapped:
            frame.torch("ids").fill_(1)
            frame.numpy("ids", slice(0, 2))[:] = 2
            wrapped.torch("half").fill_(1)
    assert path.read_bytes() == before
    assert wrap(before).torch("half")[1, 0] == 3


def test_read_only_buffer_gives_read_only_arrays() -> None:
    """NumPy views over bytes cannot be written, and torch copies only the rows asked for."""
    data = encode({"x": np.arange(10)}).tobytes()
    frame = wrap(data)
    assert not frame.numpy("x").flags.writeable and np.shares_memory(
        frame.numpy("x"), np.frombuffer(data, np.uint8)
    )
    assert frame.torch("x", slice(2, 4)).untyped_storage().nbytes() == 16


def test_writable_buffer_is_shared_with_torch() -> None:
    """Over a bytearray a torch tensor is a view."""
    data = bytearray(encode({"x": np.arange(10)}).tobytes())
    wrap(data).torch("x")[0] = 99
    assert int.from_bytes(data[-80:-72], "little") == 99


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_tensors_outlive_the_frame_and_then_free_it(path: Path) -> None:
    """After close() a view still reads; when it goes, the mapping goes."""
    with open_frame(path) as frame:
        array, tensor = frame.numpy("ids", slice(5, 6)), frame.torch("half")
    assert array[0, 0] == 5 and tensor[3, 2] == 11
    assert mapped(path)
    del array
    gc.collect()
    assert mapped(path) and tensor[3, 2] == 11
    del tensor
    gc.collect()
    assert not mapped(path)


def test_unaligned_tensors_of_other_writers(frame_of, entry) -> None:
    """A frame whose data is aligned for nothing reads right in both libraries."""
    values = np.array([1.5, -2.0, 3.25])
    entries = {
        "pad": entry("U8", [1], 0, 1),
        "x": entry("F64", [3], 1, 25),
        "half": entry("BF16", [2], 25, 29),
    }
    for lead in range(8):  # some lead leaves x at an odd address
        buffer = bytearray(lead) + frame_of(entries, b"\0" + values.tobytes() + b"\x80\x3f\x00\x40")
        frame = wrap(memoryview(buffer)[lead:])
        assert frame.numpy("x").tolist() == frame.torch("x").tolist() == values.tolist()
        assert frame.torch("half").tolist() == [1.0, 2.0]
        assert frame.torch("x").data_ptr() % 8 == 0


def test_hostile_empty_shapes_read_as_empty(frame_of, entry) -> None:
    """The largest dimensions that a tensor without elements may claim cost nothing."""
    shape = [2**26, 2**26, 0]
    frame = wrap(frame_of({"e": entry("F64", shape, 0, 0), "h": entry("BF16", shape, 0, 0)}))
    assert list(frame.numpy("e").shape) == list(frame.torch("e").shape) == shape
    assert list(frame.numpy("h", widen=True).shape) == shape and list(
        frame.torch("h", [1]).shape
    ) == [1, *shape[1:]]


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """What the operating system refuses stays its own error."""
    with pytest.raises(FileNotFoundError):
        open_frame(tmp_path / "gone")
