"""``nexrl up``: checks, starts and keeps the whole stack until it is asked to stop."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import redis
import requests
from nexrl_host.machine import lack_of_room
from nexrl_ledger import Ledger, connect, redis_fault

from nexrl_stack import embedded_redis
from nexrl_stack.services import STOP_LIMIT_S, StackSettings, stack_services
from nexrl_stack.supervisor import Supervisor

Tell = Callable[[str], None]
_LOCK = "lock"
_POLL_S = 0.1
_NOTE_EVERY_S = 15.0
_PROBE_S = 2.0
_BROKEN_STOP_S = 60.0
_IMPATIENT = "a second Ctrl-C stops at once and loses what has not been saved"


class Refused(Exception):
    """The stack cannot start as it was asked to; the message says what to do."""


def run_stack(settings: StackSettings, *, fresh: bool, ready: Tell, say: Tell) -> None:
    """Run until a stop signal, then stop all; ``ready(url)`` is called once.

    Raises Refused before anything is started, GaveUp when a process cannot be kept alive.
    """
    with locked(settings.own_folder):
        _check_port(settings.host, settings.port)
        if settings.redis_url is not None:
            _check_redis(settings.redis_url)
        if fresh:
            forget(settings.own_folder)
        full = partial(lack_of_room, settings.data)
        if (lack := full()) is not None:
            raise Refused(lack)
        try:
            supervisor = Supervisor(settings.own_folder / "logs", say, full)
        except ValueError as error:
            raise Refused(str(error)) from error
        try:
            _keep(supervisor, settings, ready, say)
        finally:
            # What _keep has not stopped itself; a part is missing then, and what waits for that
            # part waits in vain.
            supervisor.stop_within(_BROKEN_STOP_S)


def service_url(host: str, port: int) -> str:
    """The gateway's address as a client writes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` that nothing listens on."""
    return _bind(host, 0)


def _keep(supervisor: Supervisor, settings: StackSettings, ready: Tell, say: Tell) -> None:
    redis_url = settings.redis_url
    if redis_url is None:
        port = free_port()
        redis_url = embedded_redis.redis_url(port)
        supervisor.start(embedded_redis.redis_service(settings.own_folder / "redis", port))
        if not supervisor.watch(lambda: embedded_redis.answers(redis_url), every_s=_POLL_S):
            return
    for service in stack_services(settings, redis_url):
        supervisor.start(service)
    if supervisor.watch(_Readiness(settings, redis_url, supervisor, say), every_s=_POLL_S):
        ready(service_url(settings.host, settings.port))
        supervisor.watch()
    running = partial(running_operations, Ledger(connect(redis_url)))
    doing = running()
    say(
        f"stopping; waiting at most {STOP_LIMIT_S // 60} min for {doing}; {_IMPATIENT}"
        if doing
        else "stopping"
    )
    supervisor.stop(running)


class _Readiness:
    """Whether the gateway is ready and agent and checkpointers are registered; says now and then
    what is missing."""

    def __init__(
        self, settings: StackSettings, redis_url: str, supervisor: Supervisor, say: Tell
    ) -> None:
        self._settings = settings
        self._ledger = Ledger(connect(redis_url))
        self._supervisor = supervisor
        self._say = say
        self._http = requests.Session()
        # A proxy of the environment has no way to this machine's loopback.
        self._http.trust_env = False
        self._note_at = time.monotonic() + _NOTE_EVERY_S

    def __call__(self) -> bool:
        missing = self._missing()
        if missing and time.monotonic() >= self._note_at:
            self._note_at += _NOTE_EVERY_S
            self._say(
                f"still waiting for {', '.join(missing)}; logs: "
                f"{self._settings.own_folder / 'logs'}"
            )
        return not missing

    def _missing(self) -> list[str]:
        """Services that are not ready; records of an earlier run, which Redis keeps a while, do not
        count."""
        try:
            agents = {record.name: record.heartbeat for record in self._ledger.agents.heard()}
            checkpointers = {
                record.name: record.heartbeat for record in self._ledger.checkpointers.heard()
            }
        except redis.exceptions.RedisError:
            return ["redis"]
        expected = {"agent": agents.get(self._settings.agent_name, 0.0)}
        for number, name in enumerate(self._settings.checkpointer_names, start=1):
            expected[f"checkpointer-{number}"] = checkpointers.get(name, 0.0)
        missing = [
            name
            for name, heartbeat in expected.items()
            if heartbeat < self._supervisor.started_at(name)
        ]
        return missing or self._gateway_lacks()

    def _gateway_lacks(self) -> list[str]:
        """Nothing, or the gateway, with its reasons where it says any."""
        # An address that means "every interface" is reached through loopback.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)
        url = service_url(host, self._settings.port)
        try:
            answer = self._http.get(f"{url}/ready", timeout=_PROBE_S)
            return (
                []
                if answer.status_code == 200
                else [f"gateway ({'; '.join(answer.json()['reasons'])})"]
            )
        except (requests.RequestException, KeyError):
            return ["gateway"]


def _check_port(host: str, port: int) -> None:
    try:
        _bind(host, port)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Refused(
            f"port {port} on {host} cannot be used ({reason}); give another --port, 0 for a free "
            "one"
        ) from error


def _check_redis(url: str) -> None:
    try:
        there = embedded_redis.answers(url)
    except ValueError as error:
        raise Refused(f"--redis: {error}") from error
    if not there:
        raise Refused(
            "no Redis answers at --redis; start it first, or leave --redis out for the embedded one"
        )
    with connect(url) as client:
        if (fault := redis_fault(client)) is not None:
            raise Refused(f"--redis: {fault}")


def _bind(host: str, port: int) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the gateway will bind: connections of an earlier run that still linger in the kernel do
        # not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        return int(probe.getsockname()[1])


@contextmanager
def locked(own_folder: Path) -> Iterator[None]:
    """Hold ``own_folder``; raises Refused when a running stack has it. The kernel frees it however
    the holder ends."""
    try:
        own_folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(own_folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Refused(
            f"the data folder {own_folder.parent} cannot be written ({error.strerror}); give "
            "another --data"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(_in_use(own_folder.parent, os.read(lock, 32).decode().strip())) from None
        with suppress(OSError):  # on a full disk; only the message for a second `nexrl up` needs it
            os.truncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def forget(own_folder: Path) -> None:
    """Delete what earlier runs left, but no checkpoint: those lie outside. Call it while holding
    the lock."""
    for entry in own_folder.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _in_use(data: Path, holder: str) -> str:
    process = f" (process {holder})" if holder else ""
    return (
        f"the data folder {data} is in use by another `nexrl up`{process}; stop it or give "
        "another --data"
    )


def running_operations(ledger: Ledger) -> str:
    """``student: update_actor, 83 s so far``, empty where nothing runs or Redis is away."""
    try:
        groups = [group for group in ledger.groups.living() if group.running_job is not None]
        jobs = [ledger.job(str(group.running_job)) for group in groups]
    except redis.exceptions.RedisError:
        return ""
    now = time.time()
    return "; ".join(
        f"{job.identifier}: {job.operation}, {now - (job.started_at or now):.0f} s so far"
        for job in jobs
        if job is not None
    )
