"""encode: the bytes, their agreement with safetensors, and the copies that are not made."""

from __future__ import annotations

import http.server
import threading
import time
import tracemalloc

import numpy as np
import pytest
import requests
import safetensors.numpy
import safetensors.torch
import torch
from tensor_codec import ALIGNMENT, Encoded, RawTensor, encode, parse_header, wrap
from tensor_codec._checks import CODES

TORCH_DTYPES = list(CODES)
NUMPY_DTYPES = [name for name in CODES if name != "bfloat16"]


def numpy_batch() -> dict[str, np.ndarray]:
    """One array of every dtype, and the shapes that go wrong: 0-dim, empty, transposed."""
    batch = {f"t_{name}": np.arange(6).reshape(2, 3).astype(name) for name in NUMPY_DTYPES}
    extra = {
        "zero_dim": np.array(1.5),
        "empty": np.zeros((0, 4), np.int32),
        "turned": np.arange(6.0).reshape(2, 3).T,
    }
    return batch | extra


def torch_batch() -> dict[str, torch.Tensor]:
    """The same for torch, with bfloat16."""
    batch = {
        f"t_{name}": torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in TORCH_DTYPES
    }
    extra = {
        "zero_dim": torch.tensor(1.5),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "turned": torch.eye(3)[:2].T,
    }
    return batch | extra


def address(buffer: memoryview) -> int:
    """Where a buffer's memory starts."""
    return np.frombuffer(buffer, np.uint8).ctypes.data


def test_golden_bytes() -> None:
    """The bytes of a fixed input never change: metadata first and sorted, larger elements first,
    then names."""
    tensors = {
        "mask": torch.tensor([True, False]),
        "b": np.array([1, 2], np.int16),
        "a": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        "ids": np.array([[7], [8]], np.int64),
    }
    text = (
        b'{"__metadata__":{"k":"v","z":"\xc3\xa9"},'
        b'"ids":{"dtype":"I64","shape":[2,1],"data_offsets":[0,16]},'
        b'"a":{"dtype":"BF16","shape":[2],"data_offsets":[16,20]},'
        b'"b":{"dtype":"I16","shape":[2],"data_offsets":[20,24]},'
        b'"mask":{"dtype":"BOOL","shape":[2],"data_offsets":[24,26]}}'
    )
    header = b"\x38\x01\0\0\0\0\0\0" + text.ljust(0x138)
    data = (
        b"\x07"
        + b"\0" * 7
        + b"\x08"
        + b"\0" * 7
        + b"\x80\x3f\x00\xc0"
        + b"\x01\0\x02\0"
        + b"\x01\x00"
    )
    assert encode(tensors, {"z": "é", "k": "v"}).tobytes() == header + data


def test_empty_frame_golden_bytes() -> None:
    """No tensors at all is a frame too."""
    assert encode({}).tobytes() == b"\x38\0\0\0\0\0\0\0" + b"{}".ljust(56)


def test_deterministic() -> None:
    """The order of insertion does not show in the bytes."""
    batch, metadata = numpy_batch(), {"b": "1", "a": "2"}
    reverse = encode(dict(reversed(batch.items())), dict(reversed(metadata.items())))
    assert encode(batch, metadata).tobytes() == reverse.tobytes()


def test_data_is_aligned() -> None:
    """Data starts at a multiple of 64, and each tensor at a multiple of its element's size."""
    encoded = encode({**torch_batch(), "odd": np.zeros(3, np.uint8)})
    header = parse_header(encoded.header)
    assert header.data_start == len(encoded.header) and header.data_start % ALIGNMENT == 0
    for name, tensor in torch_batch().items():
        assert header.tensors[name].start % tensor.element_size() == 0


def test_safetensors_reads_ours_numpy() -> None:
    """safetensors.numpy loads every array as it was, and sees the metadata."""
    loaded = safetensors.numpy.load(encode(numpy_batch(), {"k": "v"}).tobytes())
    assert loaded.keys() == numpy_batch().keys()
    for name, array in numpy_batch().items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)


def test_safetensors_reads_ours_torch() -> None:
    """safetensors.torch loads every tensor as it was."""
    loaded = safetensors.torch.load(encode(torch_batch()).tobytes())
    assert loaded.keys() == torch_batch().keys()
    for name, tensor in torch_batch().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_safetensors_file_metadata(tmp_path) -> None:
    """A file written from the pieces opens with safetensors.safe_open, metadata too."""
    path = tmp_path / "frame.safetensors"
    with open(path, "wb") as file:
        file.writelines(encode(torch_batch(), {"step": "3"}))
    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"step": "3"}
        assert torch.equal(opened.get_tensor("t_bfloat16"), torch_batch()["t_bfloat16"])


def test_we_read_safetensors_numpy() -> None:
    """What safetensors.numpy saves, wrap() reads."""
    batch = {
        name: np.ascontiguousarray(array) if array.ndim else array
        for name, array in numpy_batch().items()
    }
    with wrap(safetensors.numpy.save(batch, {"k": "v"})) as frame:
        assert frame.header.metadata == {"k": "v"} and frame.header.tensors.keys() == batch.keys()
        for name, array in batch.items():
            read = frame.numpy(name)
            assert read.dtype == array.dtype and read.shape == array.shape
            np.testing.assert_array_equal(read, array)


def test_we_read_safetensors_torch() -> None:
    """What safetensors.torch saves, wrap() reads."""
    batch = {name: tensor.contiguous() for name, tensor in torch_batch().items()}
    with wrap(safetensors.torch.save(batch)) as frame:
        for name, tensor in batch.items():
            torch.testing.assert_close(frame.torch(name), tensor, rtol=0, atol=0)


def test_contiguous_tensors_are_not_copied() -> None:
    """The buffers are the tensors' own memory."""
    array, tensor, half = np.ones((3, 4)), torch.ones(3, 4), torch.ones(5, dtype=torch.bfloat16)
    raw = RawTensor("U8", (3,), bytearray(b"abc"))
    buffers = encode({"a": array, "b": tensor, "c": half, "d": raw}).buffers
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), array)
    assert [address(buffer) for buffer in buffers[1:3]] == [tensor.data_ptr(), half.data_ptr()]
    assert np.shares_memory(np.frombuffer(buffers[3], np.uint8), np.frombuffer(raw.data, np.uint8))


def test_buffers_keep_memory_alive() -> None:
    """The views outlive the caller's tensors."""
    encoded = encode({"a": torch.full((1000,), 7, dtype=torch.int64)})
    assert wrap(encoded.tobytes()).numpy("a").tolist() == [7] * 1000


def test_contiguous_part_of_a_large_storage_is_a_view_of_that_part() -> None:
    """Rows of a large tensor are encoded in place, and only they."""
    large = torch.arange(1_000_000)
    encoded = encode({"rows": large[10:20]})
    assert [buffer.nbytes for buffer in encoded.buffers] == [80]
    assert address(encoded.buffers[0]) == large.data_ptr() + 80


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_view_never_drags_its_storage(library: str) -> None:
    """A column of an 80 MB tensor becomes its own 8 KB in a new buffer that holds nothing more."""
    large = np.zeros((1000, 10_000))
    column = torch.from_numpy(large)[:, 3] if library == "torch" else large[:, 3]
    tracemalloc.start()
    encoded = encode({"column": column})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoded.buffers[0].nbytes == 8000 and encoded.nbytes < 10_000
    assert not np.shares_memory(np.frombuffer(encoded.buffers[0], np.uint8), large)
    assert peak < 100_000


def test_expanded_tensor_is_written_out() -> None:
    """Stride 0 becomes real elements."""
    assert wrap(encode({"x": torch.tensor([5]).expand(3)}).tobytes()).numpy("x").tolist() == [
        5,
        5,
        5,
    ]


@pytest.mark.parametrize("size", [0, 2])
def test_odd_strides_of_at_most_one_element(size: int) -> None:
    """Torch calls these contiguous although their stride is 2."""
    assert wrap(encode({"x": torch.ones(size)[::2]}).tobytes()).torch("x").tolist() == [1.0] * (
        size // 2
    )


def test_negated_view_and_gradient() -> None:
    """A lazily negated view and a tensor that requires grad are encoded by their values."""
    lazy = torch.tensor([1 + 2j]).conj().imag
    assert lazy.is_neg()
    frame = wrap(encode({"lazy": lazy, "leaf": torch.ones(2, requires_grad=True)}).tobytes())
    assert frame.numpy("lazy").tolist() == [-2.0] and frame.numpy("leaf").tolist() == [1.0, 1.0]


def test_big_endian_array_becomes_little_endian() -> None:
    """The byte order of an array is not what is written."""
    assert (
        encode({"x": np.array([1, 2], ">i4")}).tobytes()
        == encode({"x": np.array([1, 2], "<i4")}).tobytes()
    )


def test_encoded_is_an_iterable_with_length() -> None:
    """Iterating gives exactly len() bytes, header first; a tensor without elements has no
    buffer."""
    encoded = encode({"a": np.arange(3), "empty": np.zeros((0, 2))})
    pieces = [bytes(piece) for piece in encoded]
    assert pieces[0] == encoded.header and len(pieces) == 2
    assert b"".join(pieces) == encoded.tobytes() and len(encoded) == encoded.nbytes == len(
        encoded.tobytes()
    )


def post(encoded: Encoded) -> tuple[dict[str, str], bytes]:
    """Send with requests to a server on loopback; gives what arrived there."""
    seen: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers = dict(self.headers.items())
            seen.append((headers, self.rfile.read(int(headers.get("Content-Length", 0)))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            requests.post(f"http://127.0.0.1:{server.server_port}/", data=encoded, timeout=10)
        finally:
            server.shutdown()
            thread.join()
    return seen[0]


def test_requests_streams_it_with_content_length() -> None:
    """requests sends the pieces with a Content-Length, not chunked."""
    encoded = encode(torch_batch(), {"k": "v"})
    headers, body = post(encoded)
    assert headers["Content-Length"] == str(len(encoded)) and "Transfer-Encoding" not in headers
    assert body == encoded.tobytes()


def test_encoding_costs_the_header_only() -> None:
    """Six tensors of 168 MB take milliseconds and kilobytes, and as long as six of 1 KB (within a
    wide margin)."""

    def batch(rows: int, columns: int) -> dict[str, torch.Tensor]:
        dtypes = [torch.int64] * 3 + [torch.float32] * 3
        return {
            f"t{index}": torch.empty(rows, columns, dtype=dtype)
            for index, dtype in enumerate(dtypes)
        }

    def seconds(tensors: dict[str, torch.Tensor]) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            encode(tensors)
            times.append(time.perf_counter() - start)
        return min(times)

    large = batch(512, 8192)
    tracemalloc.start()
    encoded = encode(large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoded.nbytes > 150_000_000 and peak < 100_000
    assert seconds(large) < 5 * seconds(batch(4, 8)) + 0.001
