"""A command that cannot be started, with the exit code that a shell gives for it."""

from __future__ import annotations

from autotune.errors import InvalidRequest

NOT_FOUND = 127
NOT_EXECUTABLE = 126


class CommandNotFound(InvalidRequest):
    """There is no such program (127), or it is none that can be run (126)."""

    def __init__(self, message: str, *, exit_code: int = NOT_FOUND) -> None:
        super().__init__(message)
        self.exit_code = exit_code
