"""How the service and its groups are, and gauges for Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import redis
from anyio.to_thread import run_sync
from fastapi import APIRouter
from nexrl_contract import names
from nexrl_contract.errors import ServiceError
from nexrl_contract.records import GroupRecord
from nexrl_host.machine import lack_of_room
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import PlainTextResponse, Response

from nexrl_gateway.openapi import answered, refused, unavailable
from nexrl_gateway.responses import (
    GroupList,
    GroupView,
    Health,
    NotReady,
    Outage,
    ProcessView,
    Ready,
    Slots,
    WorkerInfo,
    json_response,
)
from nexrl_gateway.routes.operations import Identifier
from nexrl_gateway.services import Here, Services
from nexrl_gateway.settings import Settings
from nexrl_gateway.submit import find_group

STALE_S = 20.0
"""A live group beats every few seconds; older than this it is not believed to be well."""
_METRICS = """# HELP nexrl_jobs Jobs that have not ended.
# TYPE nexrl_jobs gauge
nexrl_jobs{queue="student",state="queued"} 1.0
"""
router = APIRouter()


@router.get(
    "/health",
    tags=["health"],
    summary="Redis, the payload store, each group and its last heartbeat",
    responses={**answered(Health), **unavailable(Outage)},
)
async def show_health(services: Here) -> Response:
    """200 with ``status`` healthy, or degraded with its ``reasons``; 503 while Redis or the store
    is away."""
    report = await run_sync(_health, services, limiter=services.room.looking)
    serving = isinstance(report, Health) and report.payload_store == "ok"
    return json_response(report, 200 if serving else 503)


@router.get(
    "/ready",
    tags=["health"],
    summary="Whether requests can be served",
    responses={**answered(Ready), **unavailable(NotReady)},
)
async def show_ready(services: Here) -> Response:
    """200, or 503 where Redis or a disk would not keep what is asked for; ``reasons`` as in
    /health."""
    report = await run_sync(_ready, services, limiter=services.room.looking)
    return json_response(report, 200 if report.ready else 503)


@router.get(
    "/metrics",
    tags=["health"],
    summary="Gauges for Prometheus",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "Done", "content": {"text/plain": {"example": _METRICS}}},
        **refused(),
    },
)
async def show_metrics(services: Here) -> Response:
    """Prometheus' text format."""
    text = await run_sync(_metrics, services)
    return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get(
    "/get_models",
    tags=["groups"],
    summary="The living groups",
    responses={**answered(GroupList), **refused()},
)
async def get_models(services: Here) -> Response:
    """Their roles, states and heartbeats."""
    views = _by_name(await run_sync(services.ledger.groups.living))
    return json_response(GroupList(identifiers=list(views), count=len(views), models=views))


@router.get(
    "/worker_info",
    tags=["groups"],
    summary="One group in detail",
    responses={**answered(WorkerInfo), **refused(400, 404, 422)},
)
async def get_worker_info(services: Here, identifier: Identifier = None) -> Response:
    """The group's record, and what its ranks say of themselves."""
    group = await run_sync(find_group, services.ledger, identifier)
    return json_response(WorkerInfo.model_validate(group))


def _health(services: Services) -> Outage:
    """A Health, or an Outage where Redis does not answer."""
    store = _store_state(services)
    reasons = _lacks(services.settings, store) + _full(services.settings.checkpoint_roots)
    ledger = services.ledger
    try:
        fault, groups = ledger.fault(), ledger.groups.living()
        agents, checkpointers = ledger.agents.heard(), ledger.checkpointers.heard()
        saves = ledger.queue_length(names.CHECKPOINT_QUEUE)
        emptied = services.watch.emptied()
    except redis.exceptions.RedisError:
        reasons.append("Redis does not answer")
        return Outage(status="degraded", redis="unavailable", payload_store=store, reasons=reasons)
    reasons += [text for text in (fault, emptied) if text]
    reasons += _troubles(groups, {agent.name for agent in agents})
    if saves and not checkpointers:
        reasons.append(f"no checkpointer is heard, and {saves} saves wait for one: start one")
    reasons += services.watch.stuck()
    return Health(
        status="degraded" if reasons else "healthy",
        redis=fault or "ok",
        payload_store=store,
        reasons=reasons,
        groups=_by_name(groups),
        agents=[ProcessView.model_validate(record) for record in agents],
        checkpointers=[ProcessView.model_validate(record) for record in checkpointers],
        slots=Slots(total=sum(a.slots for a in agents), free=sum(a.free for a in agents)),
    )


def _ready(services: Services) -> NotReady:
    """Whether what is asked for now would be done and kept: Redis and the disks are sound."""
    report = _health(services)
    sound = report.redis == "ok" and not _lacks(services.settings, report.payload_store)
    return NotReady(
        ready=sound,
        redis=report.redis,
        payload_store=report.payload_store,
        reasons=report.reasons,
    )


def _metrics(services: Services) -> bytes:
    """Gauges as Prometheus' text, looked up when it asks. Times are seconds."""
    registry = CollectorRegistry()

    def gauge(name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"nexrl_{name}", meaning, labels, registry=registry)

    ledger = services.ledger
    groups, agents = ledger.groups.living(), ledger.agents.heard()
    queues = {group.identifier: names.train_queue(group.identifier) for group in groups}
    queues |= {"agents": names.AGENT_QUEUE, "checkpoints": names.CHECKPOINT_QUEUE}
    waiting = [(name, job.state) for name, at in queues.items() for job in ledger.waiting(at)]
    up_s = time.time() - services.started_at
    gauge("gateway_uptime_seconds", "Since this gateway started.").set(up_s)
    jobs = gauge("jobs", "Jobs that have not ended.", "queue", "state")
    for labels, number in sorted(Counter(waiting).items()):
        jobs.labels(*labels).set(number)
    states = gauge("group_state", "1 for the state of a group.", "identifier", "state")
    for group in groups:
        states.labels(group.identifier, group.state).set(1)
    gauge("slots_total", "Slots of all agents.").set(sum(agent.slots for agent in agents))
    gauge("slots_free", "Slots without a rank.").set(sum(agent.free for agent in agents))
    return generate_latest(registry)


def _by_name(groups: list[GroupRecord]) -> dict[str, GroupView]:
    return {group.identifier: GroupView.model_validate(group) for group in groups}


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
