"""The card as a driver tells of it, asked beside the work: a driver that hangs holds nothing up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from autotune.values import MIB, Device

BACK_BYTES = 128 * MIB  # free memory that may be missing, and it still counts as back


class CardWatch:
    """Asks `watch` in a thread of its own, one question at a time."""

    def __init__(self, watch: Callable[[], Device | None]) -> None:
        self._watch = watch
        self._thread: threading.Thread | None = None
        self.latest: Device | None = None

    def ask(self) -> None:
        """Start a reading, unless one is still under way."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, daemon=True, name="card-watch")
            self._thread.start()

    def read(self, limit_s: float = 10.0) -> Device | None:
        """A new reading; None where the driver does not answer within the limit."""
        if self._thread is not None:
            self._thread.join(limit_s)
        self.ask()
        assert self._thread is not None
        self._thread.join(limit_s)
        return None if self._thread.is_alive() else self.latest

    def wait_for_memory(self, before: Device | None, limit_s: float = 10.0) -> Device | None:
        """Readings until as much is free as before, or the limit is over; the last one."""
        give_up_at = time.monotonic() + limit_s
        while True:
            now = self.read()
            if is_back(before, now) or time.monotonic() > give_up_at:
                return now
            time.sleep(0.25)

    def _read(self) -> None:
        self.latest = self._watch()


def is_back(before: Device | None, now: Device | None) -> bool:
    """Whether what a process had taken of a card is free again, or nobody can tell."""
    if before is None or now is None or now.kind == "cpu" or before.free_bytes is None or now.free_bytes is None:
        return True
    tenants = (tenants_bytes(now) or 0) - (tenants_bytes(before) or 0)  # what others have taken since is not ours
    return now.free_bytes + max(0, tenants) >= before.free_bytes - BACK_BYTES


def tenants_bytes(device: Device | None) -> int | None:
    """What other processes hold; None where no driver tells."""
    if device is None or any(tenant.used_bytes is None for tenant in device.tenants):
        return None
    return sum(tenant.used_bytes or 0 for tenant in device.tenants)
