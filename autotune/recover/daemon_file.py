"""One daemon a home: a lock held for its life, and a file beside it that says who it is."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from autotune.errors import InvalidRequest
from autotune.recover.identity import ProcessId
from autotune.recover.json_file import write_json
from autotune.recover.private import check_private

log = logging.getLogger(__name__)

SCHEMA = "autotune.daemon/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonFacts:
    """Which daemon it is."""

    process: ProcessId
    since_utc: str
    version: str
    devices: tuple[str, ...]
    share: int


def daemon_path(home: Path) -> Path:
    return home / "daemon.json"


def read_daemon(home: Path) -> DaemonFacts | None:
    """What the newest daemon wrote, which may have died since; None where none did, or it cannot be read."""
    try:
        document = json.loads(daemon_path(home).read_text(encoding="utf-8"))
        return DaemonFacts(
            process=ProcessId(**document["process"]),
            since_utc=document["since_utc"],
            version=document["version"],
            devices=tuple(document["devices"]),
            share=document["share"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s)", daemon_path(home), error)
        return None


def write_daemon(home: Path, facts: DaemonFacts) -> None:
    """Raises OSError."""
    write_json(daemon_path(home), {"schema": SCHEMA, **asdict(facts)})


@contextmanager
def only_daemon(home: Path) -> Iterator[None]:
    """Being the daemon of `home`. Raises InvalidRequest where another one is.

    The lock ends with the process, however that ends; a file that a dead one left is told of and replaced.
    """
    try:
        import fcntl
    except ImportError as error:
        raise InvalidRequest("the daemon runs on Linux, macOS and WSL2: use `autotune run` here") from error
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(home)
    descriptor = os.open(home / "daemon.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            first = read_daemon(home)
            pid = f" (pid {first.process.pid})" if first and first.process.is_alive else ""
            raise InvalidRequest(
                f"a daemon runs in {home} already{pid}: submit to it, or end it with `autotune daemon stop`"
            ) from error
        if (dead := read_daemon(home)) is not None:
            log.warning(
                "the daemon before this one (pid %d) died without a word: going on from there", dead.process.pid
            )
        try:
            yield
        finally:
            daemon_path(home).unlink(missing_ok=True)
    finally:
        os.close(descriptor)
