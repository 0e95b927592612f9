"""Which checkpoint a new one replaces, and its removal once the new one is durable."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import redis
from nexrl_contract.durable import remove_folder, sync_folder
from nexrl_contract.errors import ServiceError
from nexrl_contract.manifest import Manifest, read_manifest
from nexrl_contract.names import CHECKPOINTS_KEY
from pydantic import BaseModel, ValidationError

from nexrl_checkpointer.request import PublishRequest

_log = logging.getLogger(__name__)


class Latest(BaseModel):
    """A value of the Redis hash ``CHECKPOINTS_KEY``: the newest published checkpoint of one group and kind."""

    path: Path
    step: int
    job_id: str


def slot(request: PublishRequest) -> str:
    """The field of the hash: full and weight-only checkpoints do not replace one another."""
    return f"{request.identifier}:{request.kind}" + (":weight_only" if request.weight_only else "")


def replace_previous(client: redis.Redis, request: PublishRequest) -> None:
    """Remove the previous checkpoint if that was asked for, then record the new one. Repeatable.

    The new one must be durable.
    """
    previous = _latest(client, request)
    if request.remove_previous and previous is not None:
        _remove(previous, request)
    new = Latest(path=request.path, step=request.step, job_id=request.job_id)
    client.hset(CHECKPOINTS_KEY, slot(request), new.model_dump_json())


def _latest(client: redis.Redis, request: PublishRequest) -> Latest | None:
    text = client.hget(CHECKPOINTS_KEY, slot(request))
    try:
        return Latest.model_validate_json(str(text)) if text else None
    except ValidationError:
        _log.warning("previous.unreadable field=%s", slot(request))
        return None


def _remove(previous: Latest, request: PublishRequest) -> None:
    """A rename hides it first, so that no half of it is ever seen. What cannot be removed stays:

    The new one is safe.
    """
    path = previous.path
    aside = path.with_name(f".{path.name}.old-{request.job_id}")
    try:
        if _may_go(previous, request):
            os.rename(path, aside)
            sync_folder(path.parent)
            _log.info("previous.removed path=%s step=%d", path, previous.step)
        remove_folder(aside)
    except OSError as error:
        _log.warning("previous.kept path=%s reason=%s", path, error.strerror)


def _may_go(previous: Latest, request: PublishRequest) -> bool:
    """Only what this service published there for this group, and nothing that holds the new one."""
    if previous.path.is_symlink() or request.path.is_relative_to(previous.path):
        return False
    try:
        manifest: Manifest | None = read_manifest(previous.path)
    except (OSError, ServiceError):
        return False
    return manifest is not None and (manifest.identifier, manifest.job_id) == (request.identifier, previous.job_id)
