"""An HTTP server that does nothing: what a request costs before there is any service behind it."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI


def main(port: int) -> None:
    """The gateway's framework, event loop and parser."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
