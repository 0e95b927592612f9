"""RQ 3.0: the consumer overrides methods of its worker and uses names that it does not document.

Each must still be there, with the arguments that we take; nothing else of ours may touch RQ.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import rq
from nexrl_ledger import consumer
from rq.job import Job

OVERRIDDEN = sorted(
    name
    for name, value in vars(consumer._Worker).items()
    if name != "_kept_alive" and not name.startswith("__") and inspect.isfunction(value)
)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_the_consumer_overrides_is_still_rqs(name: str) -> None:
    theirs = inspect.signature(getattr(rq.SimpleWorker, name))

    assert list(inspect.signature(getattr(consumer._Worker, name)).parameters) == list(
        theirs.parameters
    )


@pytest.mark.parametrize("name", ["dequeue_timeout", "connection_timeout"])
def test_the_time_outs_that_the_consumer_overrides_are_still_rqs(name: str) -> None:
    assert isinstance(inspect.getattr_static(rq.SimpleWorker, name), property)


def test_what_a_wake_up_overrides_is_still_rqs() -> None:
    assert isinstance(inspect.getattr_static(Job, "func"), property)
    assert isinstance(inspect.getattr_static(consumer.WakeUp, "func"), property)


def test_rqs_keys_have_the_names_that_a_dropped_queue_deletes() -> None:
    queue = rq.Queue("train:x", connection=consumer.connect("redis://127.0.0.1:1/0"))

    assert (queue.key, queue.intermediate_queue_key, rq.Queue.redis_queues_keys) == (
        "rq:queue:train:x",
        "rq:queue:train:x:intermediate",
        "rq:queues",
    )
    assert consumer.REDIS_WORKER_KEYS == "rq:workers"
    assert consumer.WORKERS_BY_QUEUE_KEY % "train:x" == "rq:workers:train:x"


def test_one_module_of_ours_imports_rq() -> None:
    sources = (path for part in ("libs", "services") for path in (ROOT / part).rglob("src/**/*.py"))
    importing = [
        path.name
        for path in sources
        if re.search(r"^\s*(import|from) rq\b", path.read_text(), re.MULTILINE)
    ]

    assert importing == ["consumer.py"]
