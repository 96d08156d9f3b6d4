"""A command's output: passed through byte for byte, kept in `output.log`, its end at hand.

The command gets two pipes, never a pseudo-terminal: one would merge the streams and change the bytes ("\\n" to
"\\r\\n"). Progress bars show all the same: tqdm's do not ask for a terminal. Between the streams, order is that of
arrival.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path

from autotune.values import MIB

TAIL_BYTES = 128 * 1024
BACKLOG_BYTES = MIB  # of a slow reader: past it the command waits, as it would without us
STUCK_S = 30.0  # a reader that takes nothing for so long gets no more until it does; the log has all of it
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class Log:
    """A file that is rotated by size: FILE, FILE.1 (older), … A full disk stops nothing."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * MIB, files: int = 3) -> None:
        self.path, self._max_bytes, self._files = path, max_bytes, files
        self._handle: int | None = None
        self._size = 0
        self.error: OSError | None = None  # of the last write; None: it went well

    def write(self, data: bytes) -> None:
        try:
            if self._handle is None:
                self._open()
            elif self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            self._append(data)
            self.error = None
        except OSError as error:
            self.error = error

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self) -> None:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = os.fstat(self._handle).st_size

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            assert self._handle is not None
            written = os.write(self._handle, view)
            self._size += written
            view = view[written:]

    def _rotate(self) -> None:
        self.close()
        for number in range(self._files - 1, 0, -1):
            older = self._numbered(number)
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._numbered(number - 1), older)
        if self._files == 1:
            self.path.unlink(missing_ok=True)
        self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


class Outlet:
    """One of our own descriptors, written without ever waiting for its reader."""

    def __init__(self, descriptor: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._handle = _without_waiting(descriptor)
        self._may_wait = self._handle is not None and _may_wait(self._handle)
        self._backlog = bytearray()
        self._moved_at = clock()
        self.gone = self._handle is None
        self.stuck = False
        self.left_out_bytes = 0  # what a stuck reader did not get

    @property
    def waiting(self) -> int | None:
        """The descriptor to wait for, while there is something for it."""
        return self._handle if self._backlog and not self.gone else None

    @property
    def is_full(self) -> bool:
        """Whether the command is to wait for our reader."""
        return len(self._backlog) >= BACKLOG_BYTES and not self.gone and not self.stuck

    def write(self, data: bytes) -> None:
        if self.gone:
            return
        if self.stuck:
            self.left_out_bytes += len(data)
        else:
            if not self._backlog:
                self._moved_at = self._clock()
            self._backlog += data
        self.flush()

    def flush(self) -> None:
        """As much as the reader takes now."""
        try:
            while self._backlog and self._handle is not None:
                written = self._write_some(self._handle)
                del self._backlog[:written]
                self._moved_at, self.stuck = self._clock(), False
        except BlockingIOError:
            if len(self._backlog) >= BACKLOG_BYTES and self._clock() - self._moved_at > STUCK_S:
                self.stuck = True
        except OSError as error:
            self.gone = error.errno in _GONE
            if not self.gone:  # a full disk behind a redirection: what comes later may find room
                self.left_out_bytes += len(self._backlog)
            self._backlog.clear()

    def _write_some(self, handle: int) -> int:
        if not self._may_wait:
            return os.write(handle, self._backlog[:65536])
        if not select.select([], [handle], [], 0)[1]:
            raise BlockingIOError
        return os.write(handle, self._backlog[: select.PIPE_BUF])  # there is room for so much

    def finish(self, limit_s: float) -> None:
        """Hand over what is left, for as long as the reader takes something every `limit_s`."""
        while self.waiting is not None and self._clock() - self._moved_at < limit_s:
            self.flush()
            if self._backlog:
                time.sleep(0.01)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self.gone = True


def _may_wait(handle: int) -> bool:
    return os.get_blocking(handle) and not stat.S_ISREG(os.fstat(handle).st_mode)


def _without_waiting(descriptor: int) -> int | None:
    """A descriptor of our own for the same file, so that its readers and other writers see no change of mode.

    O_NONBLOCK belongs to the open file, which we share with the shell: a pipe or a terminal is opened anew.
    """
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return None
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    copy = os.dup(descriptor)
    if stat.S_ISSOCK(mode):
        os.set_blocking(copy, False)  # a socket cannot be opened anew
    return copy


class Output:
    """What a run prints: two outlets, one log, the end of it in memory, and what went wrong with any, said once."""

    def __init__(
        self,
        path: Path,
        *,
        stdout: int = 1,
        stderr: int = 2,
        max_bytes: int = 64 * MIB,
        files: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = Log(path, max_bytes=max_bytes, files=files)
        self.outlets = (Outlet(stdout, clock=clock), Outlet(stderr, clock=clock))
        self.bytes = 0
        self._tail = bytearray()
        self._notes: dict[str, str] = {}

    def begin(self) -> None:
        """Another attempt: the tail is its own. The log goes on."""
        self._tail.clear()
        self._notes.clear()

    def take(self, stream: int, data: bytes) -> None:
        """A piece of stream 0 (stdout) or 1 (stderr), as it arrived."""
        self.bytes += len(data)
        self._tail += data
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        self.outlets[stream].write(data)
        self.keep(data)

    def keep(self, data: bytes) -> None:
        """For the log alone: a line of the supervisor's own."""
        self.log.write(data)
        if self.log.error is not None:
            self._note("log", f"{self.log.path} misses some of the output: {self.log.error.strerror}")

    def _note(self, what: str, text: str) -> None:
        self._notes.setdefault(what, text)

    @property
    def tail(self) -> str:
        """The last 128 KiB of both streams."""
        return bytes(self._tail[-TAIL_BYTES:]).decode(errors="replace")

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be kept or passed on in this attempt, a sentence each."""
        missed = sum(outlet.left_out_bytes for outlet in self.outlets)
        if missed:
            self._note("stuck", f"{missed} bytes of output could not be passed on: they are in {self.log.path}")
        return tuple(self._notes.values())

    def finish(self, limit_s: float = 10.0) -> None:
        for outlet in self.outlets:
            outlet.finish(limit_s)

    def close(self) -> None:
        self.log.close()
        for outlet in self.outlets:
            outlet.close()
