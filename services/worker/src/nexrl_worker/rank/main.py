"""What a rank does between its start and its end: meet the others, and run the group's operations
with them."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from nexrl_contract.sections import ActorConfig
from nexrl_payloads import open_store

from nexrl_worker.rank.consumer import Consumer
from nexrl_worker.rank.control_group import ControlGroup
from nexrl_worker.rank.operations import Operations
from nexrl_worker.rank.request import Refused, Request
from nexrl_worker.settings import RankSettings

_COLLECTIVE_LIMIT = timedelta(minutes=30)
_log = logging.getLogger(__name__)


def serve(settings: RankSettings) -> None:
    """Join the group and run its operations until it is stopped or destroyed."""
    device = _device(settings)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_COLLECTIVE_LIMIT)
    control = ControlGroup()
    store = open_store(settings.payloads, fsync=settings.fsync)
    config = ActorConfig.model_validate(settings.config)
    operations = Operations(settings, config, control, store, device)
    if settings.restore:
        operations.restore()
    if settings.rank == 0:
        Consumer(settings, control, operations, store, seq=settings.seq).run(ready=settings.restore)
    else:
        follow(control, operations)
    dist.destroy_process_group()


def follow(control: ControlGroup, operations: Operations) -> None:
    """Ranks 1.. do what rank 0 says."""
    while True:
        message = control.broadcast()
        match message["do"]:
            case "run":
                try:
                    operations.run(Request(**message["request"]))
                except Refused as refused:
                    _log.info("operation.refused %s", refused)
            case "stop":
                operations.suspend(message["seq"])
                return
            case "destroy":
                return


def _device(settings: RankSettings) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        raise RuntimeError(
            "this rank was given a GPU, and torch finds none: install torch with CUDA and a "
            "driver that it knows, or start "
            "the agent with CUDA_VISIBLE_DEVICES set to nothing to use the CPU"
        )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.world_size))
    return torch.device("cpu")
