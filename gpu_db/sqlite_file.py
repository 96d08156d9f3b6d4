"""A SQLite file of autotune's: made whole or not at all, opened, its errors as one line that says what to do."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autotune.errors import StoreError

_LOCKED = "{path} is in use by another process: wait for it, or end it, and try again"
_UNWRITABLE = "{path} cannot be opened or written: make it writable, or point AUTOTUNE_HOME at a folder of yours"
_FULL = "the disk of {path} is full; what was stored is safe: free some space and try again"
_FAULTY = "reading or writing {path} failed; look for a full disk, a quota or a failing disk, then try again"
_DAMAGED = "{path} is damaged: move it and the files beside it that begin with its name away, a new one will be made"
_ADVICE = {  # by SQLite's primary result code
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_READONLY: _UNWRITABLE,
    sqlite3.SQLITE_PERM: _UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: _UNWRITABLE,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_IOERR: _FAULTY,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_ERROR: _DAMAGED,  # a table or column is missing
}


def create_if_missing(path: Path, build: Callable[[sqlite3.Connection], None], timeout_s: float) -> None:
    """Make the file under another name and move it into place, so that no process ever sees half of it."""
    if _has_content(path):
        return
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    import filelock

    try:
        with filelock.FileLock(path.parent / ".lock", timeout=timeout_s, mode=0o600):
            if not _has_content(path):
                _create(path, build)
    except filelock.Timeout as error:
        raise StoreError(_LOCKED.format(path=path)) from error


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _create(path: Path, build: Callable[[sqlite3.Connection], None]) -> None:
    new = path.with_name(f"{path.name}.new")
    for suffix in ("", "-wal", "-shm"):  # of a process that died here
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    os.close(os.open(new, os.O_CREAT | os.O_EXCL, 0o600))
    connection = connect(new, "mode=rw", timeout_s=1)
    try:
        connection.execute("PRAGMA journal_mode = WAL")  # kept in the file
        build(connection)
    finally:
        connection.close()
    for suffix in ("-wal", "-shm"):  # of a database that was moved away: SQLite would read them into the new one
        stale = Path(f"{path}{suffix}")
        if stale.exists():
            stale.replace(f"{stale}.old")
    new.replace(path)


def connect(path: Path, mode: str, timeout_s: float) -> sqlite3.Connection:
    """A connection in which transactions are begun by hand. `mode`: the query of SQLite's file URI."""
    uri = f"{path.absolute().as_uri()}?{mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)


@contextmanager
def closed_on_error(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Leaves the connection open unless something is raised."""
    try:
        yield connection
    except BaseException:
        connection.close()
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        raise StoreError(f"{_ADVICE.get(code, _FAULTY).format(path=path)} ({error})") from error
    except OSError as error:
        advice = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else _UNWRITABLE
        raise StoreError(f"{advice.format(path=path)} ({error.strerror})") from error
