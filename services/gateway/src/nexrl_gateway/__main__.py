"""``python -m nexrl_gateway``: serve until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import resource
import signal
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nexrl_gateway.app import create_app
from nexrl_gateway.direct import DirectProtocol
from nexrl_gateway.settings import Settings

_KEEP_ALIVE_S = 300
_GRACE_S = 10
_FILES_PER_CONNECTION = 4
"""Its socket; for an upload a second descriptor of that, and files of the store."""
_M_MMAP_THRESHOLD = -3
_MAPPED_BYTES = 4 * 1024**2
_SWITCH_S = 0.0005
"""How long a thread keeps the interpreter while another waits for it, as /health has to a dozen
times."""


class _Server(uvicorn.Server):
    """Answers those who wait for a job before it goes, and then ends with 0 instead of by the
    signal itself."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if hasattr(self._app.state, "services"):
            self._app.state.services.completions.stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def main() -> int:
    """Exit status 1 where the server could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        settings = Settings.from_env()
    except ValueError as error:
        sys.exit(str(error))
    app = create_app(settings)
    sys.setswitchinterval(_SWITCH_S)
    _return_memory()
    gc.collect()
    # what lives as long as the process; with it each large JSON body would cost five times as much
    gc.freeze()
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=DirectProtocol,
        ws="none",
        limit_concurrency=_connections(settings.max_connections),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    logging.getLogger("nexrl_gateway").info(
        "gateway.starting host=%s port=%d", settings.host, settings.port
    )
    server = _Server(config, app)
    server.run()
    return 0 if server.started else 1


def _return_memory() -> None:
    """What glibc may keep of freed memory are small pieces; by itself it soon keeps whole bodies of
    32 MiB."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _connections(wanted: int) -> int:
    """As many of the ``wanted`` connections as this process may have descriptors for, after asking
    for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = _FILES_PER_CONNECTION * wanted
    allowed = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return min(wanted, allowed // _FILES_PER_CONNECTION)


if __name__ == "__main__":
    sys.exit(main())
