"""What a systemd service of Type=notify says of itself; nothing where systemd did not start this process."""

from __future__ import annotations

import os
import time


class Notifier:
    """Speaks to systemd through sdnotify."""

    def __init__(self) -> None:
        self._systemd = None
        if os.environ.get("NOTIFY_SOCKET"):
            import sdnotify

            self._systemd = sdnotify.SystemdNotifier()
        asked_of = os.environ.get("WATCHDOG_PID", str(os.getpid()))
        wanted = os.environ.get("WATCHDOG_USEC", "0") if asked_of == str(os.getpid()) else "0"
        self._every_s = int(wanted) / 1e6 / 3 if wanted.isdecimal() else 0.0  # systemd advises half of it at most
        self._next = 0.0

    def say(self, state: str) -> None:
        if self._systemd is not None:
            self._systemd.notify(state)

    def alive(self) -> None:
        """WATCHDOG=1, as often as was asked for."""
        now = time.monotonic()
        if self._every_s and now >= self._next:
            self._next = now + self._every_s
            self.say("WATCHDOG=1")

    def close(self) -> None:
        if self._systemd is not None and self._systemd.socket is not None:
            self._systemd.socket.close()
