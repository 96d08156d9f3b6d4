"""JSON lines between parent and worker, on a descriptor of their own: libraries print to stdout."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class Channel:
    """One end. `send` is whole-line and thread-safe; `receive` waits for a line, `lines` takes what is there."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._lock = threading.Lock()
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> Message | None:
        """The next message; None when the other end is closed."""
        while b"\n" not in self._buffer:
            if not self._fill():
                return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: Message = json.loads(line)
        return message

    def lines(self) -> tuple[list[Message], bool]:
        """Messages that one read completes, and whether the other end is closed. Blocks when nothing is there."""
        open_ = self._fill()
        *complete, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in complete if line], not open_

    def _fill(self) -> bool:
        try:
            data = self._socket.recv(65536)
        except ConnectionResetError:
            return False
        self._buffer += data
        return bool(data)

    def close(self) -> None:
        self._socket.close()
