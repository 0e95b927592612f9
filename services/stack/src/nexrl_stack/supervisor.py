"""Starts processes, starts again what dies, and stops all in the reverse order of starting; none
outlives this one."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nexrl_host.processes import die_with_parent, log_limit, rotate_logs

from nexrl_stack.services import Service

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_QUICK_S = 10.0
_QUICK_DEATHS = 5
_BACKOFF_S = 0.25
_KILLED_S = 5.0
_SAME_CTRL_C_S = 1.0
_TAIL_LINES = 20
_SAID_BYTES = 64 * 1024
_LOOK_EVERY_S = 1.0
_TELL_EVERY_S = 15.0
_LOGS_EVERY_S = 5.0


class GaveUp(Exception):
    """A process dies again and again right after its start; the message ends with the tail of its
    log."""


class Supervisor:
    """Children of the *main* thread, since the kernel kills them when the thread that forked them
    ends."""

    def __init__(
        self,
        logs: Path,
        say: Callable[[str], None],
        obstacle: Callable[[], str | None] = lambda: None,
    ) -> None:
        """``obstacle`` says why nothing can live at the moment: deaths do not count then, and the
        dead wait for its end."""
        self._logs = logs
        self._say = say
        self._obstacle = obstacle
        self._log_bytes = log_limit()
        self._stopping = False
        self._children: list[_Child] = []
        self._stop_since: float | None = None
        self._hurry = False
        # A handler may interrupt any line of the main thread; SimpleQueue.put is the one primitive
        # that is re-entrant.
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        logs.mkdir(parents=True, exist_ok=True)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda received, _frame: self._signals.put(received))

    def start(self, service: Service) -> None:
        """Start a process; from now on it is started again when it dies."""
        child = _Child(service, self._logs / f"{service.name}.log")
        self._children.append(child)
        child.start()

    def started_at(self, name: str) -> float:
        """When the present process of a service was started, in seconds since the epoch."""
        return next(child.started_at for child in self._children if child.service.name == name)

    def watch(self, done: Callable[[], bool] = lambda: False, *, every_s: float = 60.0) -> bool:
        """Keep everything running until ``done()`` (True) or a stop signal (False); raises
        GaveUp."""
        while self._stop_since is None:
            if done():
                return True
            self._sleep(min(every_s, _LOGS_EVERY_S))
            rotate_logs(self._logs, self._log_bytes)
            for child in self._children:
                self._revive(child)
        return False

    def stop(self, progress: Callable[[], str]) -> None:
        """Stop all, last started first, and keep the others running meanwhile; a second Ctrl-C ends
        what is left at once.

        ``progress`` tells what is still waited for.
        """
        self._stopping = True
        while self._children:
            child = self._children.pop()
            self._stop(child, child.service.grace_s, progress)

    def stop_within(self, seconds: float) -> None:
        """Stop what still runs, where some of it cannot: each process gets so long at the most."""
        self._children = [child for child in self._children if child.restart_at is None]
        while self._children:
            child = self._children.pop()
            self._stop(child, min(child.service.grace_s, seconds), None)

    def _sleep(self, seconds: float) -> None:
        due = [
            child.restart_at - time.monotonic()
            for child in self._children
            if child.restart_at is not None
        ]
        try:
            received = self._signals.get(timeout=max(0.0, min([seconds, *due])))
        except queue.Empty:
            return
        if received not in STOP_SIGNALS:
            return
        if self._stop_since is None:
            self._stop_since = time.monotonic()
        # A program that started us may pass on the Ctrl-C of a terminal to both of us: only a later
        # one is impatience.
        self._hurry |= (
            received == signal.SIGINT and time.monotonic() - self._stop_since > _SAME_CTRL_C_S
        )

    def _revive(self, child: _Child) -> None:
        if child.restart_at is not None:
            if time.monotonic() >= child.restart_at:
                self._start_again(child)
            return
        code = child.process.poll()
        if code is None:
            return
        child.end_group()
        name = child.service.name
        if (obstacle := self._obstacle()) is not None:
            child.hold_back()
            self._say(
                f"{obstacle}; {name} has ended ({_describe(code)}) and is started again as soon "
                "as there is room"
            )
            return
        if not self._stopping and (why := child.service.hopeless(child.said())) is not None:
            raise GaveUp(why)
        delay_s = child.count_death()
        if child.quick_deaths >= _QUICK_DEATHS and not self._stopping:
            raise GaveUp(
                f"{name} died {_QUICK_DEATHS} times right after its start; the end of "
                f"{child.log}:\n{child.tail()}"
            )
        self._say(
            f"{name} died ({_describe(code)}); it is started again in {delay_s:g} s; log: "
            f"{child.log}"
        )

    def _start_again(self, child: _Child) -> None:
        if child.held_back:
            if self._obstacle() is not None:
                child.hold_back()
                return
            self._say(f"there is room again; {child.service.name} is started")
        child.start()

    def _stop(self, child: _Child, grace_s: float, progress: Callable[[], str] | None) -> None:
        if child.restart_at is not None:
            return
        deadline = time.monotonic() + grace_s
        tell_at = time.monotonic() + _TELL_EVERY_S
        if child.process.poll() is None:
            child.process.terminate()
        while child.process.poll() is None and time.monotonic() < deadline and not self._hurry:
            self._sleep(min(deadline, tell_at) - time.monotonic())
            if progress is not None:
                for other in self._children:
                    self._revive(other)
                if time.monotonic() >= tell_at:
                    tell_at += _TELL_EVERY_S
                    self._tell(child, progress())
        if child.process.poll() is None:
            self._say(
                f"{child.service.name} {'' if self._hurry else 'did not stop in time and '}is "
                "killed"
            )
        child.end_group()

    def _tell(self, child: _Child, doing: str) -> None:
        obstacle = self._obstacle()
        reasons = [reason for reason in (doing, obstacle) if reason]
        self._say(
            f"still waiting for {child.service.name}{': ' if reasons else ''}{'; '.join(reasons)}"
        )


class _Child:
    """A service and its process, which leads a session of its own: a terminal's Ctrl-C reaches only
    the supervisor."""

    process: subprocess.Popen[bytes]

    def __init__(self, service: Service, log: Path) -> None:
        self.service = service
        self.log = log
        self.started_at = 0.0
        self.restart_at: float | None = None
        self.quick_deaths = 0
        self.held_back = False
        self._said_from = 0

    def start(self) -> None:
        self.restart_at = None
        self.held_back = False
        self.started_at = time.time()
        with self.log.open("ab") as log:
            self._said_from = log.tell()
            self.process = subprocess.Popen(
                self.service.argv,
                env={**os.environ, **self.service.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def count_death(self) -> float:
        """Plan the next start; seconds until then, doubled with each death right after a start."""
        quick = time.time() - self.started_at < _QUICK_S
        self.quick_deaths = self.quick_deaths + 1 if quick else 0
        delay_s = _BACKOFF_S * 2.0 ** max(0, self.quick_deaths - 1)
        self.restart_at = time.monotonic() + delay_s
        return delay_s

    def hold_back(self) -> None:
        """Plan the next look at what keeps it from living."""
        self.held_back = True
        self.restart_at = time.monotonic() + _LOOK_EVERY_S

    def end_group(self) -> None:
        """Kill what is left of the process and its session's group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return
        finally:
            self.process.wait(_KILLED_S)

    def said(self) -> str:
        """What the present process has logged, the last of it where that is much."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._said_from, size - _SAID_BYTES))
            return log.read().decode(errors="replace")

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def _describe(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
