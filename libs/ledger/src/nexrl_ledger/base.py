"""What the parts of the ledger share: the client and the scripts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.records import encode_fields

from nexrl_ledger import scripts

_CONSTANTS = {"RESULT_TTL": names.RESULT_TTL_S, "TOMBSTONE_TTL": names.TOMBSTONE_TTL_S}
_SCRIPTS = {
    "claim": scripts.CLAIM,
    "finish": scripts.FINISH,
    "cancel": scripts.CANCEL,
    "hand_over": scripts.HAND_OVER,
    "update_group": scripts.UPDATE_GROUP,
    "start_epoch": scripts.START_EPOCH,
    "end_group": scripts.END_GROUP,
    "roll_back": scripts.ROLL_BACK,
    "hold_result": scripts.HOLD_RESULT,
    "take_due": scripts.TAKE_DUE,
    "drop_finished": scripts.DROP_FINISHED,
    "drop_destroyed": scripts.DROP_DESTROYED,
}


class Fenced(Exception):
    """The caller's epoch or attempt is no longer the current one: what it wanted to write is not
    history."""


class LedgerPart:
    """Reads and atomic changes of records; safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types replies as decoded or raw, single or nested; this client always decodes.
        self.client: Any = client
        self._script = {
            name: client.register_script(_with_constants(text)) for name, text in _SCRIPTS.items()
        }

    def hashes(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Those hashes, in one round trip; an empty one for a key that is not there."""
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            found: list[dict[str, str]] = pipe.execute()
        return found


def optional(value: object | None) -> str:
    """A script's argument, empty for None."""
    return "" if value is None else str(value)


def flat(fields: dict[str, Any]) -> list[str]:
    """Fields of a record as a script takes them: name, value, name, value..."""
    return [item for pair in encode_fields(fields).items() for item in pair]


def _with_constants(text: str) -> str:
    for name, value in _CONSTANTS.items():
        text = text.replace(name, str(value))
    return text
