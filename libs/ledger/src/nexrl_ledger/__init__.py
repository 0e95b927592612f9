"""The operation ledger: jobs, groups and agents in Redis, and the bell that wakes whoever runs
them."""

from nexrl_ledger.base import Fenced
from nexrl_ledger.bell import Bell, ResidentWorker
from nexrl_ledger.connection import connect, is_away, redis_fault, until_redis
from nexrl_ledger.ledger import Ledger

__all__ = [
    "Bell",
    "Fenced",
    "Ledger",
    "ResidentWorker",
    "connect",
    "is_away",
    "redis_fault",
    "until_redis",
]
