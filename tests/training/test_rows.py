"""A rank's rows of a stored batch: a store without files is asked once for each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import redis
import torch
from nexrl_contract.errors import ServiceError
from nexrl_contract.operations import OPERATIONS
from nexrl_payloads import open_store
from nexrl_worker.rank.batches import PayloadRows
from tensor_codec import encode

IDS = torch.arange(8 * 6).reshape(8, 6)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "advantages": torch.randn(8)}


def asked(url: str) -> int:
    """How often the server was asked for a range of a value."""
    with redis.Redis.from_url(url) as client:
        return int(client.info("commandstats").get("cmdstat_getrange", {"calls": 0})["calls"])


@pytest.mark.parametrize("kept", [[2, 3, 4, 5], [0, 3, 6]])
@pytest.mark.parametrize("wanted", [slice(3, 5), [3], [5, 3], [6, 0]])
def test_kept_rows_are_the_rows_of_the_batch(
    redis_url: str, kept: list[int], wanted: Sequence[int] | slice
) -> None:
    """Whatever is kept, and whether the rows wanted are among it or not, their values are those
    that were sent."""
    store = open_store(redis_url)
    store.put("batch", encode(BATCH))
    with PayloadRows(store, "batch", OPERATIONS["update_actor"]) as rows:
        rows.keep(kept)
        for name, tensor in BATCH.items():
            assert torch.equal(rows.tensor(name, wanted), tensor[wanted])


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids_come_as_signed_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    """As torch computes nothing with them; beyond int64 they are negative, and so no token."""
    store = open_store(f"file://{tmp_path}")
    store.put(
        "batch",
        encode({"input_ids": IDS.to(dtype), "responses": torch.full((8, 2), 2**16 - 1).to(dtype)}),
    )
    with PayloadRows(store, "batch", OPERATIONS["update_actor"]) as rows:
        for wanted in (slice(0, 8), [1, 5]):
            assert torch.equal(rows.tensor("input_ids", wanted), IDS[wanted])
            assert rows.tensor("responses", wanted).min() == 2**16 - 1


@pytest.mark.parametrize("where", ["file", "redis"])
def test_damage_in_kept_rows_is_found_before_any_is_used(
    redis_url: str, tmp_path: Path, where: str
) -> None:
    """Also in a tensor that is asked for much later; rows of another rank are that rank's to
    find."""
    url = redis_url if where == "redis" else f"file://{tmp_path}"
    store = open_store(url)
    ids = torch.arange(64 * 512).reshape(64, 512)
    frame = bytearray(encode({"input_ids": ids, "advantages": torch.ones(64)}).tobytes())
    checksum = store.put("batch", [frame]).checksum
    last = len(frame) - 1
    if where == "file":
        frame[last] ^= 1
        (tmp_path / "batch").write_bytes(frame)
    else:
        with redis.Redis.from_url(url) as client:
            client.setrange(
                next(client.scan_iter(match="nexrl:payload:batch:*:0")),
                last,
                bytes([frame[last] ^ 1]),
            )
    with PayloadRows(store, "batch", OPERATIONS["update_actor"], checksum) as rows:
        assert torch.equal(rows.tensor("input_ids", slice(0, 20)), ids[:20])
        with pytest.raises(
            ServiceError, match=r"PAYLOAD_DAMAGED: .*tensor advantages rows 0 to 63"
        ):
            rows.keep([60, 61, 62, 63])


def test_kept_rows_are_fetched_once(redis_url: str) -> None:
    """Checks, masks and micro-batches read the same rows; over the network they go once."""
    store = open_store(redis_url)
    store.put("batch", encode(BATCH))
    with PayloadRows(store, "batch", OPERATIONS["update_actor"]) as rows:
        rows.keep([2, 3, 4, 5])
        rows.tensor("input_ids", [2])
        before = asked(redis_url)
        for wanted in ([2, 3], [4, 5], slice(3, 5), [5, 2]):
            rows.tensor("input_ids", wanted)
        assert asked(redis_url) == before
        rows.tensor("input_ids", [7])
        assert asked(redis_url) > before
