"""Names that cross a process boundary: Redis keys, queues, content types, patterns."""

from __future__ import annotations

import ipaddress
import re
import time
import uuid

IDENTIFIER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
KEY_PATTERN = r"^[A-Za-z0-9_.:-]{1,128}$"
FRAME_TYPE = "application/vnd.nexrl.frame"
JSON_TYPE = "application/json"
CHECKSUM_HEADER = "X-Checksum-XXH3-128"
REQUEST_ID_HEADER = "X-NexRL-Request-ID"
"""A request's own mark, which its answer repeats: so an answer is known to be of its request."""

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
AGENT_QUEUE = "agents"
CHECKPOINT_QUEUE = "checkpoints"

_PREFIX = "nexrl"
GROUPS_KEY = f"{_PREFIX}:groups"
AGENTS_KEY = f"{_PREFIX}:agents"
CHECKPOINTERS_KEY = f"{_PREFIX}:checkpointers"
JOBS_KEY = f"{_PREFIX}:jobs"
ORDER_KEY = f"{_PREFIX}:order"
CHECKPOINTS_KEY = f"{_PREFIX}:checkpoints"
ENDED_CHANNEL = f"{_PREFIX}:ended"
LEDGER_KEY = f"{_PREFIX}:ledger"
"""Tells one Redis from another, and from itself after it was emptied."""
JANITOR_KEY = f"{_PREFIX}:janitor"
DELIVERED_KEY = f"{_PREFIX}:delivered"
"""Sorted set, time -> job id: results that have been delivered; infinity while one is being
removed."""
SPENT_KEY = f"{_PREFIX}:spent"
"""Sorted set, time -> idempotency key: keys of jobs whose records were dropped because there were
many."""
FORGOTTEN_KEY = f"{_PREFIX}:forgotten"
"""The youngest id among the jobs that were dropped so."""
DESTROYED_KEY = f"{_PREFIX}:destroyed"
"""Sorted set, time -> identifier: destroyed groups whose records are there still."""

RESULT_TTL_S = 24 * 3600
TOMBSTONE_TTL_S = 8 * 24 * 3600

_IDENTIFIER = re.compile(IDENTIFIER_PATTERN)
_KEY = re.compile(KEY_PATTERN)


def train_queue(identifier: str) -> str:
    """The queue that the group's rank 0 consumes."""
    return f"train:{identifier}"


def group_key(identifier: str) -> str:
    return f"{_PREFIX}:group:{identifier}"


def agent_key(name: str) -> str:
    return f"{_PREFIX}:agent:{name}"


def checkpointer_key(name: str) -> str:
    return f"{_PREFIX}:checkpointer:{name}"


def job_key(job_id: str) -> str:
    return f"{_PREFIX}:job:{job_id}"


def idempotency_key(key: str) -> str:
    return f"{_PREFIX}:key:{key}"


def waiting_key(queue: str) -> str:
    """Sorted set, order -> job id: the jobs of one queue that have not ended."""
    return f"{_PREFIX}:waiting:{queue}"


def applied_key(identifier: str) -> str:
    """Sorted set, sequence number -> job id: what the group's weights contain."""
    return f"{_PREFIX}:applied:{identifier}"


def valid_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


def valid_idempotency_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def new_job_id() -> str:
    """32 hex digits that begin with the time in milliseconds (the layout of UUIDv7), so ids sort by
    age."""
    milliseconds = int(time.time() * 1000)
    return f"{milliseconds:012x}7{uuid.uuid4().hex[:19]}"


def job_age_s(job_id: str) -> float | None:
    """Seconds since ``job_id`` was made, None where the id is not one of ours."""
    if re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{19}", job_id) is None:
        return None
    return time.time() - int(job_id[:12], 16) / 1000


def is_loopback(host: str) -> bool:
    """Whether an address or name, as a URL has it, means this machine itself: no proxy leads
    there."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def without_password(url: str) -> str:
    """An address as messages may show it: without user and password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
