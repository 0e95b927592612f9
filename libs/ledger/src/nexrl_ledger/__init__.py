"""The operation ledger: jobs, groups and agents in Redis, and the consumers that are woken to run
them."""

from nexrl_ledger.connection import connect, follow_ended, is_away, redis_fault, until_redis
from nexrl_ledger.consumer import QueueConsumer, drop_queue
from nexrl_ledger.ledger import Ledger
from nexrl_ledger.scripts import Fenced

__all__ = [
    "Fenced",
    "Ledger",
    "QueueConsumer",
    "connect",
    "drop_queue",
    "follow_ended",
    "is_away",
    "redis_fault",
    "until_redis",
]
