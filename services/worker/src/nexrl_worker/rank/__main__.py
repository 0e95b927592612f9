"""One rank of a worker group: ``python -m nexrl_worker.rank``, started by torchrun on behalf of the
agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from pathlib import Path

from nexrl_host.processes import die_with_parent
from nexrl_ledger import Fenced

from nexrl_worker.channel import Channel
from nexrl_worker.settings import GroupFolders, RankSettings

EXIT_FAILED = 75
EXIT_FENCED = 70
_log = logging.getLogger(__name__)


def main() -> None:
    """Serve until told to stop. Whatever goes wrong after a vote ends the process: its peers sit in
    a collective it left."""
    die_with_parent(os.getppid())
    settings = RankSettings.from_env()
    _leave_if_orphaned(settings.agent_pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    folders = GroupFolders(settings.data, settings.identifier)
    _log_to(folders.logs / f"rank{settings.rank}.log")
    folders.channel.tell_pid(settings.rank)
    try:
        # Not earlier: torch takes seconds to load, and a launcher that dies meanwhile must take
        # this process along.
        from nexrl_worker.rank.main import serve

        serve(settings)
    except Fenced as error:
        _log.warning("rank.fenced %s", error)
        os._exit(EXIT_FENCED)
    except BaseException as error:
        _log.exception("rank.failed")
        _tell_failure(folders.channel, settings.rank, error)
        os._exit(EXIT_FAILED)
    os._exit(0)


def _leave_if_orphaned(agent_pid: int) -> None:
    """The launcher may have died before the kernel was asked to take us along. While it lives, its
    parent is the agent."""
    if sys.platform == "linux":
        stat = Path(f"/proc/{os.getppid()}/stat").read_text()
        if int(stat.rpartition(")")[2].split()[1]) != agent_pid:
            os._exit(EXIT_FAILED)


def _log_to(path: Path) -> None:
    """Everything the process prints goes to its own log, native libraries' words included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _tell_failure(channel: Channel, rank: int, error: BaseException) -> None:
    from nexrl_worker.training.observe.costs import is_out_of_memory

    short = "out of memory: " if is_out_of_memory(error) else ""
    message = f"{short}{type(error).__name__}: {error}"
    channel.tell_failure(rank, message, traceback.format_exc())


main()
