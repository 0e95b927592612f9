"""How the ranks of a group are started, watched and ended; what only one host can know of them."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nexrl_contract.records import GroupRecord
from nexrl_host.processes import (
    die_with_parent,
    how_it_ended,
    oom_kills,
    signal_name,
    wait_status,
)

from nexrl_worker.settings import AgentSettings, GroupFolders

_LOG_TAIL_BYTES = 2000
_LAST_WORDS_S = 0.2
_LAST_STATUS_S = 1.0
_KILLED_S = 5.0
_LONGEST_CAUSE = 1000
_log = logging.getLogger(__name__)


class Slots:
    """The agent's slots: GPUs by index or by UUID, or a number of CPU ranks.

    The agent's main thread takes them, the groups' threads give them back.
    """

    def __init__(self, total: int, gpus: tuple[str, ...]) -> None:
        self._lock = threading.Lock()
        self._total = total
        self._free = total
        self._order = gpus
        self._gpus = list(gpus[:total])

    @property
    def free(self) -> int:
        """Slots that no group holds. It only grows until the main thread takes some."""
        return self._free

    def take(self, count: int) -> tuple[str, ...]:
        """Reserve ``count`` slots; the GPUs that come with them, none on CPU."""
        with self._lock:
            assert count <= self._free
            self._free -= count
            taken, self._gpus = tuple(self._gpus[:count]), self._gpus[count:]
            return taken

    def give_back(self, count: int, gpus: tuple[str, ...]) -> None:
        """The inverse of :meth:`take`."""
        with self._lock:
            self._free += count
            self._gpus = sorted([*self._gpus, *gpus], key=self._order.index)

    def shortage(self, count: int, agent: str) -> str:
        """Why a group of ``count`` ranks waits."""
        return f"{count} slots: {self._free} of {self._total} are free on agent {agent}"


class Exit(NamedTuple):
    """How the processes of a group ended: ``cause`` None after a stop or a destroy, else why, and
    the rank that began it where that is known."""

    cause: str | None = None
    rank: int | None = None


class Launcher(Protocol):
    """The processes of one incarnation of a group, on whichever hosts they run.

    One thread makes all calls. It asks the ranks to stop by way of the channel.
    """

    def start(self) -> None:
        """Start the ranks, and for a new group the check of its models. Raises OSError."""

    @property
    def checked(self) -> bool:
        """Whether that check has ended: what it has to say stands in the channel."""

    def poll(self) -> Exit | None:
        """None while the ranks live. One that died is enough for an exit with its cause."""

    def kill(self) -> None:
        """End every process; none is left on return. May be repeated."""


class LocalTorchrun:
    """All ranks on this host, under one torchrun. They die with the thread that started them."""

    def __init__(
        self, settings: AgentSettings, group: GroupRecord, epoch: int, gpus: tuple[str, ...]
    ) -> None:
        self._identifier = group.identifier
        self._world_size = group.world_size
        self._checks = not group.initialised
        self._folders = GroupFolders(settings.data, group.identifier)
        self._environment = _environment(settings, group, epoch, gpus)
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._check: subprocess.Popen[bytes] | None = None
        self._pidfds: dict[int, int] = {}
        self._oom_kills = oom_kills()

    def start(self) -> None:
        """See :class:`Launcher`."""
        self._folders.logs.mkdir(parents=True, exist_ok=True)
        self._torchrun = self._run(
            _torchrun(self._world_size, "nexrl_worker.rank"), self._environment, "torchrun.log"
        )
        if self._checks:
            on_cpu = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            self._check = self._run(
                ["-m", "nexrl_worker.rank.model_folder"], self._environment | on_cpu, "check.log"
            )

    @property
    def checked(self) -> bool:
        """See :class:`Launcher`."""
        return self._check is None or self._check.poll() is not None

    def poll(self) -> Exit | None:
        """See :class:`Launcher`. A pidfd tells of a dead rank at once, torchrun only later."""
        assert self._torchrun is not None
        code = self._torchrun.poll()
        if code == 0:
            return Exit()
        dead = [rank for rank, pidfd in self._watched().items() if _readable(pidfd, 0)]
        if not dead and code is None:
            return None
        # Race: after a stop or a destroy a rank may be gone and torchrun not yet. Ranks leave only
        # after the channel has said so, therefore whoever sees the rank gone sees the message.
        channel = self._folders.channel
        if code is None and (channel.stop_asked or channel.destroyed_by is not None):
            return None
        return self._exit(dead, code)

    def kill(self) -> None:
        """See :class:`Launcher`. The ranks die with torchrun."""
        if self._torchrun is None:
            return
        for process in (self._check, self._torchrun):
            if process is not None:
                process.kill()
                process.wait()
        for pidfd in self._watched().values():
            _readable(pidfd, _KILLED_S)
            os.close(pidfd)
        self._pidfds.clear()

    def _run(
        self, arguments: list[str], environment: dict[str, str], log: str
    ) -> subprocess.Popen[bytes]:
        with (self._folders.logs / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    def _watched(self) -> dict[int, int]:
        """A pidfd for each rank that has told its process id; readable once the rank has ended."""
        if hasattr(os, "pidfd_open"):
            for rank in self._pidfds.keys() ^ range(self._world_size):
                # Race: a rank may end before it is watched. Its pid is not another's yet, since
                # torchrun has not waited for it; torchrun's own exit tells of it otherwise.
                with suppress(ProcessLookupError):
                    if (pid := self._folders.channel.pid(rank)) is not None:
                        self._pidfds[rank] = os.pidfd_open(pid)
        return self._pidfds

    def _exit(self, dead: list[int], code: int | None) -> Exit:
        """A rank without a message was killed; the others failed because it vanished: blame it."""
        time.sleep(_LAST_WORDS_S)  # race: a rank that is dying may be writing its message
        failures = self._folders.channel.failures(self._world_size)
        silent = [rank for rank in dead if rank not in failures]
        if silent:
            how = how_it_ended(self._status(silent[0]), oom_kills() - self._oom_kills)
            log = f"see its log (nexrl logs {self._identifier})"
            return Exit(f"rank {silent[0]} {how} without a message; {log}", silent[0])
        if failures:
            rank, first = min(failures.items(), key=lambda item: item[1].at)
            return Exit(f"rank {rank}: {first.message}"[:_LONGEST_CAUSE], rank)
        how = f"exit code {code}" if code is None or code > 0 else f"signal {signal_name(-code)}"
        tail = _last_line(self._folders.logs / "torchrun.log")
        return Exit(f"the launcher ended with {how}: {tail}"[:_LONGEST_CAUSE])

    def _status(self, rank: int) -> int | None:
        """The wait status of a rank that has ended, as soon as torchrun has waited for it; None
        where the kernel does not tell."""
        deadline = time.monotonic() + _LAST_STATUS_S
        while (status := wait_status(self._pidfds[rank])) is None and time.monotonic() < deadline:
            time.sleep(_LAST_WORDS_S / 4)
        return status


def _torchrun(world_size: int, module: str) -> list[str]:
    """Its own rendezvous finds a free port, and does not let go of it before the ranks have met."""
    return [
        *("-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world_size}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *("--max-restarts=0", "-m", module),
    ]


def _environment(
    settings: AgentSettings, group: GroupRecord, epoch: int, gpus: tuple[str, ...]
) -> dict[str, str]:
    document: dict[str, Any] = {
        "identifier": group.identifier,
        "epoch": epoch,
        "role": group.role,
        "config": group.config,
        "redis_url": settings.redis_url,
        "data": str(settings.data),
        "payloads": settings.payloads,
        "fsync": settings.fsync,
        "restore": group.initialised,
        "seq": group.seq,
        "agent_pid": os.getpid(),
    }
    threads = max(1, (os.cpu_count() or 1) // group.world_size)
    return {
        # The driver's numbers; CUDA's own begin with the fastest
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **os.environ,
        "NEXRL_GROUP": json.dumps(document),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
        # A thread that spins while it waits takes the core from whoever it waits for: another rank,
        # or the trainer.
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _readable(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def _last_line(path: Path) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
