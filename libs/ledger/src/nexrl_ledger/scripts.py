"""The ledger's Redis: one client, and the Lua scripts that change several records in one step."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import redis
from nexrl_contract import names

_FOLDER = resources.files("nexrl_ledger") / "lua"
_SHARED = _FOLDER / "shared.lua"
SCRIPTS = {
    file.name.removesuffix(".lua"): f"{_SHARED.read_text()}\n{file.read_text()}"
    for file in _FOLDER.iterdir()
    if file.name.endswith(".lua") and file.name != _SHARED.name
}
"""Each script by its name, as Redis gets it."""
_COMMON = json.dumps(
    {
        "job_prefix": names.job_key(""),
        "group_prefix": names.group_key(""),
        "waiting_prefix": names.waiting_key(""),
        "idempotency_prefix": names.idempotency_key(""),
        "ended_channel": names.ENDED_CHANNEL,
        "result_ttl": str(names.RESULT_TTL_S),
        "tombstone_ttl": str(names.TOMBSTONE_TTL_S),
    }
)


class Fenced(Exception):
    """The caller's epoch or attempt is no longer the current one: what it wanted to write is not
    history."""


class Database:
    """A client and the scripts; safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        # redis-py types replies as decoded or raw, single or nested; this client always decodes.
        self.client: Any = client
        self._scripts = {name: client.register_script(text) for name, text in SCRIPTS.items()}

    def run(self, script: str, keys: Sequence[str], **args: object) -> Any:
        """The answer of a script, which names its keys and its ``args``; None is an argument left
        out, a list holds strings."""
        given = {
            name: value if isinstance(value, list) else str(value)
            for name, value in args.items()
            if value is not None
        }
        return self._scripts[script](keys=keys, args=[json.dumps(given), _COMMON])

    def hashes(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Those hashes, in one round trip; an empty one for a key that is not there."""
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            found: list[dict[str, str]] = pipe.execute()
        return found
