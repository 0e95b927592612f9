"""One rank of a worker group: ``python -m nexrl_worker.rank``, started by torchrun on behalf of the agent."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nexrl_contract.config import parse_config
from nexrl_contract.errors import ServiceError
from nexrl_contract.processes import die_with_parent
from nexrl_ledger import Fenced
from nexrl_payloads import open_store

from nexrl_worker.consumer import Consumer
from nexrl_worker.operations import Operations
from nexrl_worker.outcome import Request
from nexrl_worker.settings import GroupFolders, RankSettings
from nexrl_worker.team import Team

EXIT_FAILED = 75
EXIT_FENCED = 70
_COLLECTIVE_LIMIT = timedelta(minutes=30)
_log = logging.getLogger(__name__)


def main() -> None:
    """Serve until told to stop. Whatever goes wrong after a vote ends the process: its peers sit in a collective it left."""
    die_with_parent(os.getppid())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    settings = RankSettings.from_env()
    folders = GroupFolders(settings.data, settings.identifier)
    _log_to(folders.logs / f"rank{settings.rank}.log")
    folders.pid(settings.rank).write_text(str(os.getpid()))
    try:
        serve(settings)
    except Fenced as error:
        _log.warning("rank.fenced %s", error)
        os._exit(EXIT_FENCED)
    except BaseException as error:
        _log.exception("rank.failed")
        _leave_word(folders.error(settings.rank), settings.rank, error)
        os._exit(EXIT_FAILED)
    os._exit(0)


def serve(settings: RankSettings) -> None:
    """Join the group and run its operations until it is stopped or destroyed."""
    device = _device(settings)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_COLLECTIVE_LIMIT)
    team = Team()
    store = open_store(settings.payloads, fsync=settings.fsync)
    config = parse_config({"actor": settings.config}).entry.actor
    operations = Operations(settings, config, team, store, device)
    if settings.restore:
        operations.restore()
    if settings.rank == 0:
        Consumer(settings, team, operations, store, seq=settings.seq).run(ready=settings.restore)
    else:
        follow(team, operations)
    dist.destroy_process_group()


def follow(team: Team, operations: Operations) -> None:
    """Ranks 1.. do what rank 0 says."""
    while True:
        message = team.broadcast()
        match message["do"]:
            case "run":
                try:
                    operations.run(Request(**message["request"]))
                except ServiceError as refused:
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
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.world_size))
    return torch.device("cpu")


def _log_to(path: Path) -> None:
    """Everything the process prints goes to its own log, native libraries' words included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _leave_word(path: Path, rank: int, error: BaseException) -> None:
    words: dict[str, Any] = {
        "rank": rank,
        "message": f"{type(error).__name__}: {error}",
        "trace": traceback.format_exc(),
    }
    path.write_text(json.dumps(words))


if __name__ == "__main__":
    main()
