"""The exception tree: each error carries its exit code, and its message ends in what to do next."""

from __future__ import annotations

from typing import Any


class AutotuneError(Exception):
    """Root of every error that a user is meant to read: one line, no traceback."""

    exit_code = 1


class InvalidRequest(AutotuneError):
    """The request cannot be run as it stands (a value, a file, a model)."""


class UsageError(AutotuneError):
    """The command line itself is wrong (an option's value, two options that exclude each other)."""

    exit_code = 2


class NothingFits(AutotuneError):
    """No legal config fits. `closest` is the trial (a `TrialRecord`) that came nearest, or None."""

    exit_code = 3

    def __init__(self, message: str, *, closest: Any = None) -> None:
        super().__init__(message)
        self.closest = closest


class GpuUnavailable(AutotuneError):
    """The device asked for is not here, or cannot be used."""

    exit_code = 4


class ProbeFailed(AutotuneError):
    """A probe died of something other than memory. Carries its exit code and the end of its stderr."""

    def __init__(self, message: str, *, worker_exit_code: int | None = None, stderr_tail: str = "") -> None:
        super().__init__(message)
        self.worker_exit_code = worker_exit_code
        self.stderr_tail = stderr_tail


class StoreError(AutotuneError):
    """The GPU database cannot be read or written."""


class Interrupted(AutotuneError):
    """The user stopped it; everything measured so far is kept."""

    exit_code = 130
