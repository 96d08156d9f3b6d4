"""What a user asked to stop: signals and a cancel, as the handlers saw them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

_APART_S = 0.25  # `timeout` and others send the same signal twice at once: that is one request


class StopRequests:
    """The handlers only add to it; the loop looks at it. One object for a whole run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: list[tuple[float, int]] = []

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        self._seen.append((self._clock(), number))

    def cancel(self) -> None:
        """As a SIGTERM would."""
        self.receive(signal.SIGTERM)

    @property
    def requested(self) -> bool:
        return bool(self._seen)

    @property
    def number(self) -> int:
        """What to forward: SIGINT as it is, all else as SIGTERM."""
        return signal.SIGINT if self._seen and self._seen[0][1] == signal.SIGINT else signal.SIGTERM

    @property
    def urgent(self) -> bool:
        """Whether it was asked again: at once, then."""
        return len(self._seen) > 1 and self._seen[-1][0] - self._seen[0][0] >= _APART_S

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM and SIGHUP (unless it is ignored: nohup) in the main thread, until the block ends."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
