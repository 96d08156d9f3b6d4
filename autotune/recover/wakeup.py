"""Sleep that a signal ends: signal handlers set a flag, and the loop that waits here sees it at once."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Wakeup:
    """Made in the main thread; `stop` is set by SIGTERM, SIGINT and SIGHUP. The end of a child wakes, too."""

    def __init__(self) -> None:
        self.stop: int | None = None  # the signal that asked for it

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are heard; before and after they are as they were."""
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)
        before = {number: signal.signal(number, self._asked) for number in _STOPPING}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(self._read)
            os.close(write)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.stop = number

    def wait(self, seconds: float) -> bool:
        """Up to so long; whether a signal ended it."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        if ready:
            while len(os.read(self._read, 512)) == 512:
                pass
        return bool(ready)
