"""What tests of the whole service share: a batch, and a look at the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nexrl_client import HTTPTrainServiceClient
from nexrl_ledger import connect

from tests.helpers.stack import Stack

VOCABULARY = 64
StartGroup = Callable[..., HTTPTrainServiceClient]


def make_batch(
    rows: int = 5, length: int = 10, responses: int = 6, seed: int = 0
) -> dict[str, Any]:
    """Random tokens; ragged rows: row i has its first i % 3 positions padded and its last token
    unscored where i is odd."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    attention = torch.ones(rows, length, dtype=torch.int64)
    loss_mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        attention[row, : row % 3] = 0
        loss_mask[row, -1] = 1 - row % 2
    return {
        "tensors": {
            "input_ids": input_ids,
            "attention_mask": attention,
            "loss_mask": loss_mask,
            "responses": input_ids[:, -responses:],
            "advantages": torch.randn(rows, generator=generator),
        },
        "metadata": {"temperature": 1.0, "global_step": 1},
    }


def fingerprint(client: HTTPTrainServiceClient) -> str:
    """The weights' fingerprint, by way of a published folder."""
    path = f"fingerprints/{client.identifier}"
    return str(
        client.save_checkpoint(path, saved_fully_shared_ckpt=False, remove_previous_ckpt=False)[
            "fingerprint"
        ]
    )


def leftovers(stack: Stack) -> list[str]:
    """What operations that have ended left behind: payloads of requests, staging folders, Redis
    keys that would stay for ever."""
    own = stack.data / ".nexrl"
    files = [
        path.name
        for path in (own / "payloads").rglob("*")
        if path.is_file() and not path.name.endswith(".result")
    ]
    files += [path.name for path in (own / "staging").glob("*")]
    client = connect(stack.redis_url)
    lasting = [
        key
        for key in client.keys("*")
        if client.ttl(key) == -1 and not _permanent(key, client.smembers("nexrl:groups"))
    ]
    client.close()
    return files + lasting


_INDEXES = (
    "ledger",
    "delivered",
    "spent",
    "forgotten",
    "order",
    "jobs",
    "groups",
    "agents",
    "checkpointers",
    "checkpoints",
)


def _permanent(key: str, groups: set[str]) -> bool:
    """Indexes of fixed size, and one record and one list a living group."""
    if key in {f"nexrl:{name}" for name in _INDEXES}:
        return True
    if key in {f"nexrl:{kind}:{group}" for kind in ("group", "applied") for group in groups}:
        return True
    return key == "rq:queues" or key.startswith("rq:workers")
