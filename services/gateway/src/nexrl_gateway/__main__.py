"""``python -m nexrl_gateway``: serve until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
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


class _Server(uvicorn.Server):
    """Answers those who wait for a job before it goes, and then ends with 0 instead of by the signal itself."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if hasattr(self._app.state, "services"):
            self._app.state.services.endings.stop()
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
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=DirectProtocol,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        access_log=False,
        log_config=None,
        server_header=False,
    )
    logging.getLogger("nexrl_gateway").info("gateway.starting host=%s port=%d", settings.host, settings.port)
    server = _Server(config, app)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
