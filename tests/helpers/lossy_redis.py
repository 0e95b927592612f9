"""A Redis whose replies can be lost on the way."""

from __future__ import annotations

import contextlib
import socket
import threading


class LosesReplies:
    """Stands before a Redis server; what is to be lost is carried out but not answered: the
    connection ends instead.

    ``command``: the next one that contains these bytes. ``reply``: the next answer that contains
    these.
    """

    def __init__(self, port: int) -> None:
        self.command: bytes | None = None
        self.reply: bytes | None = None
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            socket.create_connection(("127.0.0.1", self._port)) as server,
            contextlib.suppress(OSError),
        ):
            replies = threading.Thread(target=self._relay, args=(server, client), daemon=True)
            replies.start()
            while data := client.recv(1 << 16):
                if self.command is not None and self.command in data:
                    self.command = None
                    client.shutdown(socket.SHUT_RDWR)
                    server.sendall(data)
                    replies.join(0.2)
                    return
                server.sendall(data)

    def _relay(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if self.reply is not None and self.reply in data:
                    self.reply = None
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
