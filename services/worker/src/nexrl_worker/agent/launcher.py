"""The processes of one incarnation of a group: torchrun and its ranks, how they start, and what is
known when they end."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from nexrl_contract.records import GroupRecord
from nexrl_host.processes import die_with_parent, memory_groups
from nexrl_storage import at

from nexrl_worker.settings import AgentSettings, GroupFolders

_LOG_TAIL_BYTES = 2000
_LAST_WORDS_S = 0.2
_LAST_STATUS_S = 1.0
_LONGEST_CAUSE = 1000
# Linux 6.15: _IOWR(0xFF, 11, struct pidfd_info of 64 bytes), whose mask asks for, and then has, the
# wait status.
_PIDFD_GET_INFO, _PIDFD_INFO_BYTES, _PIDFD_INFO_EXIT, _STATUS_AT = 0xC040FF0B, 64, 1 << 3, 60


class Failure(NamedTuple):
    """Why a group's processes ended, and the rank that began it where that is known."""

    cause: str
    rank: int | None


class GroupProcess:
    """Start it from the agent's main thread: the children die with the thread that forked them.
    Raises OSError."""

    def __init__(
        self, settings: AgentSettings, group: GroupRecord, epoch: int, gpus: tuple[str, ...]
    ) -> None:
        self.identifier = group.identifier
        self.world_size = group.world_size
        self.epoch = epoch
        self.gpus = gpus
        self.folders = GroupFolders(settings.data, group.identifier)
        if not group.initialised:
            self.forget_state()  # of a former group of that name
        at(self.folders.run).remove(self.folders.run, recursive=True)
        self.folders.run.mkdir(parents=True)
        self.folders.logs.mkdir(parents=True, exist_ok=True)
        environment = _environment(settings, group, epoch, gpus)
        self._torchrun = self._start(_torchrun(group.world_size), environment, "torchrun.log")
        self._check: subprocess.Popen[bytes] | None = None
        if not group.initialised:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            self._check = self._start(
                [sys.executable, "-m", "nexrl_worker.rank.model_folder"], environment, "check.log"
            )
        self._watched: dict[int, int] = {}
        self._oom_kills = oom_kills()
        self._ended_because: str | None = None

    @property
    def checked(self) -> bool:
        """Whether it is known by now if the group's models can be run: `refusal` says so."""
        return self._check is None or self._check.poll() is not None

    @property
    def refusal(self) -> dict[str, Any] | None:
        """The error of a group whose models no rank can run."""
        return _read(self.folders.refused)

    def poll_failure(self) -> Failure | None:
        """Set once a rank or torchrun has died without being asked to."""
        code = self._torchrun.poll()
        if code == 0:
            return None
        dead = [rank for rank, descriptor in self._descriptors().items() if _ended(descriptor)]
        if not dead and code is None:
            return None
        if dead and code is None and self._clean_exit_under_way():
            return None
        return self._cause(dead, code)

    @property
    def ended_cleanly(self) -> bool:
        """Every rank returned after a stop or a destroy."""
        return self._torchrun.poll() == 0

    def destroy_job(self) -> str | None:
        """The ``destroy`` job that ended the group, None when it was something else."""
        try:
            return str(json.loads(self.folders.destroyed.read_text())["job_id"])
        except (FileNotFoundError, ValueError):
            return None

    def forget_state(self) -> None:
        """Remove what a clean stop kept: it belongs to a group that is no more."""
        for folder in (self.folders.state, self.folders.new_state):
            shutil.rmtree(folder, ignore_errors=True)

    def request_stop(self) -> None:
        """Ask the ranks to end after the current operation, keeping their state."""
        self.folders.stop_request.touch()

    def wait(self, timeout_s: float) -> bool:
        """Whether torchrun has ended within ``timeout_s``."""
        try:
            self._torchrun.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, cause: str) -> None:
        """Begin to kill it for a reason that only the caller knows; whoever watches it sees the end
        with that cause."""
        self._ended_because = cause
        self._torchrun.kill()

    def kill(self) -> None:
        """End torchrun at once; its ranks die with it."""
        if self._check is not None:
            self._check.kill()
            self._check.wait()
        self._torchrun.kill()
        self._torchrun.wait()
        for descriptor in self._descriptors().values():
            select.select([descriptor], [], [], 5.0)
        self.close()

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._watched.values():
            os.close(descriptor)
        self._watched.clear()

    def _start(
        self, command: list[str], environment: dict[str, str], log: str
    ) -> subprocess.Popen[bytes]:
        with (self.folders.logs / log).open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )

    def _clean_exit_under_way(self) -> bool:
        return self.folders.destroyed.exists() or self.folders.stop_request.exists()

    def _descriptors(self) -> dict[int, int]:
        """A pidfd for each rank that has told its process id: it becomes readable when the rank
        ends."""
        if not hasattr(os, "pidfd_open"):
            return {}
        for rank in range(self.world_size):
            if rank not in self._watched:
                try:
                    self._watched[rank] = os.pidfd_open(int(self.folders.pid(rank).read_text()))
                except (FileNotFoundError, ProcessLookupError, ValueError):
                    continue
        return self._watched

    def _cause(self, dead: list[int], code: int | None) -> Failure:
        """The rank that began it: one that died without a word was killed, and its peers only lost
        their connection to it."""
        if self._ended_because is not None:
            return Failure(self._ended_because, None)
        time.sleep(_LAST_WORDS_S)
        words = {
            rank: said
            for rank in range(self.world_size)
            if (said := _read(self.folders.error(rank))) is not None
        }
        silent = [rank for rank in dead if rank not in words]
        if silent:
            how = how_it_ended(self._status(silent[0]), oom_kills() - self._oom_kills)
            log = f"see its log (nexrl logs {self.identifier})"
            return Failure(f"rank {silent[0]} {how} without a message; {log}", silent[0])
        if words:
            rank, first = min(words.items(), key=lambda item: float(item[1]["time"]))
            return Failure(f"rank {rank}: {first['message']}"[:_LONGEST_CAUSE], rank)
        tail = _tail(self.folders.logs / "torchrun.log")
        return Failure(f"the launcher ended with {_exit_text(code)}: {tail}"[:_LONGEST_CAUSE], None)

    def _status(self, rank: int) -> int | None:
        """The wait status of a rank that has ended, as soon as the launcher has waited for it; None
        where it is not told."""
        deadline = time.monotonic() + _LAST_STATUS_S
        while (status := wait_status(self._watched[rank])) is None and time.monotonic() < deadline:
            time.sleep(_LAST_WORDS_S / 4)
        return status


def how_it_ended(status: int | None, oom_kills: int) -> str:
    """In words, by the wait status and what the kernel killed meanwhile for want of memory, see
    `oom_kills`."""
    if status is None:
        return "was killed or crashed"
    if not os.WIFSIGNALED(status):
        return f"ended with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL and oom_kills > 0:
        return (
            f"was killed by SIGKILL, out of memory (the kernel has killed {oom_kills} for want of "
            "memory since the group began),"
        )
    verb = (
        "was killed by"
        if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        else "crashed with"
    )
    return f"{verb} {signal_name(number)}"


def signal_name(number: int) -> str:
    """SIGKILL, or `signal 34` where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for want of memory, in this process's control group:
    its ranks are in it, too.

    Where no control group counts, on the host, others' included; 0 where that does not say either.
    """
    names = {2: "memory.events", 1: "memory.oom_control"}
    counters = [folder / names[version] for version, folder in memory_groups(root)]
    for counter in (*counters, root / "proc/vmstat"):
        with suppress(OSError):
            for line in counter.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def wait_status(descriptor: int) -> int | None:
    """Of a process that is another's child and has been waited for; None before, and where the
    kernel is too old to tell."""
    info = bytearray(_PIDFD_INFO_BYTES)
    struct.pack_into("Q", info, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(descriptor, _PIDFD_GET_INFO, info)
    except OSError:
        return _zombie_status(descriptor)
    has: int = struct.unpack_from("Q", info)[0]
    status: int = struct.unpack_from("i", info, _STATUS_AT)[0]
    return status if has & _PIDFD_INFO_EXIT else _zombie_status(descriptor)


def _zombie_status(descriptor: int) -> int | None:
    """The wait status of a process that nobody has waited for yet."""
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
        pid = next(line.split()[1] for line in lines if line.startswith("Pid:"))
        state, *_, status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, StopIteration):
        return None
    return int(status) if state == "Z" else None


def _torchrun(world_size: int) -> list[str]:
    return [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            f"--nproc-per-node={world_size}",
        ),
        *("--master-addr=127.0.0.1", f"--master-port={_free_port()}", "--max-restarts=0"),
        *("-m", "nexrl_worker.rank"),
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
        # nvidia-smi's numbers; CUDA's own begin with the fastest
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return {**json.loads(path.read_text()), "time": path.stat().st_mtime}
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _tail(path: Path) -> str:
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def _exit_text(code: int | None) -> str:
    return f"signal {signal_name(-code)}" if code is not None and code < 0 else f"exit code {code}"
