"""The two ways that a batch travelled before, written from their published behaviour.

"1.2 HTTP": every tensor is pickled and written as base64 into one JSON body; a FastAPI server
checks it with a pydantic model, decodes it in the handler, and sends the tensors to its worker
process by ZMQ ``send_pyobj``. "1.4 ZMQ": ``send_pyobj`` of the dict of tensors straight to the
worker, without server, store or ledger. Here the worker reads every byte once and answers with the
moment at which it had, as the service's rank does in this run.
"""

from __future__ import annotations

import base64
import pickle  # noqa: TID251 - what is measured here is how the older versions sent tensors; nothing of ours does
import sys
import time
from collections.abc import Mapping
from typing import Any

import requests
import torch
import uvicorn
import zmq
from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor

from benchmarks.batches import digest


class Body(BaseModel):
    """The JSON of 1.2: tensor name -> base64 of its pickle."""

    batch: dict[str, str]
    meta_info: dict[str, Any] = {}


class HttpBaseline:
    """The client of 1.2."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/update_actor"
        self._session = requests.Session()
        self._session.trust_env = False

    def send(self, tensors: Mapping[str, Tensor]) -> tuple[float, str]:
        """When the worker had read all values, and their digest."""
        batch = {
            name: base64.b64encode(pickle.dumps(tensor)).decode()
            for name, tensor in tensors.items()
        }
        answer = self._session.post(
            self._url, json={"batch": batch, "meta_info": {"temperature": 1.0}}, timeout=120
        )
        answer.raise_for_status()
        read_at, seen = answer.json()
        return float(read_at), str(seen)

    def close(self) -> None:
        """End the connection."""
        self._session.close()


class ZmqBaseline:
    """The client of 1.4."""

    def __init__(self, port: int) -> None:
        self._socket = _ask(port)

    def send(self, tensors: Mapping[str, Tensor]) -> tuple[float, str]:
        """As :meth:`HttpBaseline.send`."""
        self._socket.send_pyobj(dict(tensors))
        answer: Any = self._socket.recv_json()
        return float(answer[0]), str(answer[1])

    def close(self) -> None:
        """End the connection."""
        self._socket.close(0)


def serve_http(port: int, worker_port: int) -> None:
    """The server of 1.2."""
    app = FastAPI()
    worker = _ask(worker_port)

    @app.post("/update_actor")
    async def update_actor(body: Body) -> Any:
        tensors = {name: pickle.loads(base64.b64decode(text)) for name, text in body.batch.items()}  # noqa: S301
        worker.send_pyobj({"batch": tensors, "meta_info": body.meta_info})
        return worker.recv_json()

    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="warning"
    )


def work(port: int) -> None:
    """The worker of both: receives tensors, reads them, says when it had."""
    torch.set_num_threads(1)
    socket: Any = zmq.Context.instance().socket(zmq.REP)
    socket.bind(f"tcp://127.0.0.1:{port}")
    while True:
        received = socket.recv_pyobj()
        tensors = received.get("batch", received)
        seen = digest(tensors)
        socket.send_json([time.monotonic(), seen])


def _ask(port: int) -> Any:
    socket: Any = zmq.Context.instance().socket(zmq.REQ)
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


if __name__ == "__main__":
    role, *ports = sys.argv[1:]
    serve = serve_http if role == "http" else work
    serve(*map(int, ports))
