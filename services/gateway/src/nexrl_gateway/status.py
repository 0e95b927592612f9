"""What is up: the truth behind ``/health``, ``/get_models`` and ``/metrics``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import redis
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord, ProcessRecord
from nexrl_host.machine import lack_of_room
from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily

from nexrl_gateway.services import Services
from nexrl_gateway.settings import Settings

STALE_S = 20.0
"""A live group beats every few seconds; older than this it is not believed to be well."""


def health(services: Services) -> tuple[dict[str, Any], bool]:
    """What ``/health`` shows, and whether Redis and the payload store answer. ``reasons`` say why
    it is not healthy."""
    store = _store_state(services)
    reasons = _lacks(services.settings, store) + _full(services.settings.checkpoint_roots)
    report: dict[str, Any] = {
        "status": "degraded",
        "redis": "ok",
        "payload_store": store,
        "reasons": reasons,
    }
    try:
        fault = services.ledger.fault()
        groups = services.ledger.groups.living()
        agents, checkpointers = (
            services.ledger.agents.heard(),
            services.ledger.checkpointers.heard(),
        )
        saves = services.ledger.queue_length(names.CHECKPOINT_QUEUE)
        emptied = services.watch.emptied()
    except redis.exceptions.RedisError:
        reasons.append("Redis does not answer")
        return {**report, "redis": "unavailable"}, False
    report["redis"] = fault or "ok"
    reasons += [text for text in (fault, emptied) if text]
    reasons += _troubles(groups, {agent.name for agent in agents})
    if saves and not checkpointers:
        reasons.append(f"no checkpointer is heard, and {saves} saves wait for one: start one")
    reasons += services.watch.stuck()
    report["status"] = "degraded" if reasons else "healthy"
    report["groups"] = {group.identifier: _brief(group) for group in groups}
    report["agents"] = [_process(record) for record in agents]
    report["checkpointers"] = [_process(record) for record in checkpointers]
    report["slots"] = {"total": sum(a.slots for a in agents), "free": sum(a.free for a in agents)}
    return report, report["payload_store"] == "ok"


def ready(services: Services) -> tuple[dict[str, Any], bool]:
    """What ``/ready`` shows, and whether what is asked for now would be done and kept: Redis and
    the disks are sound."""
    report, serving = health(services)
    sound = (
        serving
        and report["redis"] == "ok"
        and not _lacks(services.settings, report["payload_store"])
    )
    shown = {name: report[name] for name in ("redis", "payload_store", "reasons")}
    return {"ready": sound, **shown}, sound


def models(services: Services) -> dict[str, Any]:
    """What ``/get_models`` shows."""
    groups = services.ledger.groups.living()
    return {
        "status": "success",
        "identifiers": [group.identifier for group in groups],
        "count": len(groups),
        "models": {group.identifier: _brief(group) for group in groups},
    }


def worker_info(group: GroupRecord) -> dict[str, Any]:
    """What ``/worker_info`` shows: the record of a group, and what its ranks say of themselves."""
    return {
        "status": "success",
        "identifier": group.identifier,
        **_brief(group),
        "seq": group.seq,
        "nodes": [share.host for share in group.placement],
        "running_job": group.running_job,
        "ignored": group.ignored,
        "config": group.config,
        "created_at": group.created_at,
        "info": group.info,
    }


class _Gauges:
    """What Prometheus collects, looked up when it asks. Times are seconds."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Every gauge."""
        ledger = self._services.ledger
        groups, agents = ledger.groups.living(), ledger.agents.heard()
        queues = {group.identifier: names.train_queue(group.identifier) for group in groups}
        queues |= {"agents": names.AGENT_QUEUE, "checkpoints": names.CHECKPOINT_QUEUE}
        up = time.time() - self._services.started_at
        yield GaugeMetricFamily(
            "nexrl_gateway_uptime_seconds", "Since this gateway started.", value=up
        )
        jobs = GaugeMetricFamily(
            "nexrl_jobs", "Jobs that have not ended.", labels=["queue", "state"]
        )
        counted = Counter(
            (name, job.state) for name, queue in queues.items() for job in ledger.waiting(queue)
        )
        for labels, number in sorted(counted.items()):
            jobs.add_metric(labels, number)
        yield jobs
        states = GaugeMetricFamily(
            "nexrl_group_state", "1 for the state of a group.", labels=["identifier", "state"]
        )
        for group in groups:
            states.add_metric([group.identifier, group.state], 1)
        yield states
        total, free = sum(agent.slots for agent in agents), sum(agent.free for agent in agents)
        yield GaugeMetricFamily("nexrl_slots_total", "Slots of all agents.", value=total)
        yield GaugeMetricFamily("nexrl_slots_free", "Slots without a rank.", value=free)


def metrics(services: Services) -> bytes:
    """Prometheus' text format."""
    return generate_latest(_Gauges(services))


def _store_state(services: Services) -> str:
    try:
        services.store.check()
    except ServiceError as error:
        return error.message
    return "ok"


def _lacks(settings: Settings, store: str) -> list[str]:
    """What keeps requests from being served: the payload store's fault, and a full disk of it or of
    the data folder."""
    folders = [settings.data]
    if settings.payloads.startswith("file://"):
        folders.append(Path(settings.payloads.removeprefix("file://")))
    return ([] if store == "ok" else [store]) + _full(folders)


def _full(folders: Iterable[Path]) -> list[str]:
    return [text for folder in folders if (text := lack_of_room(folder))]


def _troubles(groups: list[GroupRecord], heard: set[str]) -> list[str]:
    """Groups that are down or silent, and agents that are missing."""
    found = [] if heard else ["no agent is heard: no group can be placed; start one"]
    for group in groups:
        if group.state == "down":
            found.append(f"group {group.identifier} is down: {group.cause or 'unknown cause'}")
        elif _stale(group):
            found.append(f"group {group.identifier} has not been heard for more than {STALE_S:g} s")
        elif group.state in ("starting", "up", "ready"):
            found += [
                f"group {group.identifier}: its agent {agent} is not heard"
                for agent in group.unheard(heard)
            ]
    return found


def _stale(group: GroupRecord) -> bool:
    return group.state in ("up", "ready") and (
        group.heartbeat is None or time.time() - group.heartbeat > STALE_S
    )


def _brief(group: GroupRecord) -> dict[str, Any]:
    return {
        "world_size": group.world_size,
        "role": group.role,
        "state": group.state,
        "initialised": group.initialised,
        "epoch": group.epoch,
        "last_heartbeat": group.heartbeat,
        "cause": group.cause,
        "agent": group.leader,
    }


def _process(record: ProcessRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "host": record.host,
        "device": record.device,
        "slots": record.slots,
        "free": record.free,
        "last_heartbeat": record.heartbeat,
    }
