"""Both stores, and batches to put into them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensor_codec
import xxhash
from nexrl_payloads import PayloadStore, open_store


def url_of(folder: Path) -> str:
    """The URL of a folder as a store."""
    return f"file://{folder}"


def checksum(data: bytes) -> str:
    """What a client sends along with a part."""
    return str(xxhash.xxh3_128_hexdigest(data))


def some_bytes(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat, the same for the same seed."""
    return np.random.default_rng(seed).bytes(nbytes)


def some_batch(rows: int = 16, columns: int = 1000) -> dict[str, np.ndarray]:
    """Tensors of several sizes, alignments and ranks."""
    rng = np.random.default_rng(1)
    return {
        "input_ids": rng.integers(0, 50_000, (rows, columns)),
        "log_probs": rng.random((rows, columns), np.float32),
        "mask": rng.integers(0, 2, (rows, columns + 1)).astype(bool),
        "advantages": rng.random(rows),
        "scale": np.array(0.5, np.float32),
        "empty": np.zeros((rows, 0), np.int16),
    }


def frame(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of a frame."""
    return tensor_codec.encode(tensors, {"nexrl": "{}"}).tobytes()


def send_part(
    store: PayloadStore, payload_id: str, n: int, data: bytes, claimed: str | None = None
) -> int:
    """Send one part in two chunks, as a gateway does."""
    with store.put_part(payload_id, n, len(data)) as part:
        part.write(data[: len(data) // 3])
        part.write(data[len(data) // 3 :])
        return part.commit(claimed or checksum(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the ``file://`` store."""
    return tmp_path / "payloads"


@pytest.fixture
def file_store(folder: Path) -> PayloadStore:
    """A store in a folder."""
    return open_store(url_of(folder))


@pytest.fixture
def redis_store(redis_url: str) -> PayloadStore:
    """A store in the session's Redis."""
    return open_store(redis_url)


@pytest.fixture(params=["file", "redis"])
def store(request: pytest.FixtureRequest) -> PayloadStore:
    """Each store in turn."""
    found: PayloadStore = request.getfixturevalue(f"{request.param}_store")
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]).returncode
    ):
        pytest.skip(
            "only root may mount a small disk; test_file_size_limit covers the same refusal"
        )
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)
