"""Payloads to put into a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensor_codec
import xxhash
from nexrl_payloads import PayloadStore


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
