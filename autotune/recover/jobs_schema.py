"""The schema of the queue's database, as the ordered steps that build it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from autotune.errors import StoreError
from gpu_db.migrations import Step, migrate, schema_version
from gpu_db.sqlite_file import connect, create_if_missing, explained

#: `PRAGMA application_id` of jobs.db: "atjb" in ASCII.
APPLICATION_ID = 0x61746A62


def create_tables(db: Any) -> None:
    """Schema 1: jobs, whose rows follow the run, and its incidents, which are only added."""
    db["jobs"].create(
        {
            "id": int,
            "kind": str,
            "name": str,
            "state": str,
            "command": str,
            "cwd": str,
            "options": str,
            "environ": str,
            "hooks": str,
            "gpu": str,
            "device": str,
            "submitted_utc": str,
            "started_utc": str,
            "ended_utc": str,
            "updated_utc": str,
            "exit_code": int,
            "supervisor": str,
            "run_folder": str,
            "attempts": int,
            "restarts": int,
            "step_at_start": int,
            "phase": str,
            "step": int,
            "max_steps": int,
            "tokens_per_second": float,
            "step_time_s": float,
            "loss": float,
            "memory_bytes": int,
            "memory_limit_bytes": int,
            "message": str,
        },
        pk="id",
        not_null={"kind", "state", "command", "cwd", "options", "environ", "hooks", "gpu", "submitted_utc"},
        defaults={"attempts": 0, "restarts": 0, "message": ""},
    )
    db["jobs"].create_index(["state"])
    db["incidents"].create(
        {
            "id": int,
            "job_id": int,
            "number": int,
            "attempt": int,
            "time_utc": str,
            "verdict": str,
            "action": str,
            "phase": str,
            "step": int,
            "steps_lost": int,
            "seconds_lost": float,
            "resumed_from": str,
            "message": str,
            "incident": str,
        },
        pk="id",
        not_null={"job_id", "number", "incident"},
        foreign_keys=[("job_id", "jobs", "id")],
    )
    db["incidents"].create_index(["job_id"])


#: A released step never changes; a new schema is a new step at the end.
STEPS: tuple[Step, ...] = (create_tables,)
SCHEMA_VERSION = len(STEPS)


def make(path: Path, busy_timeout_s: float) -> None:
    """Make the file, or upgrade it. Raises StoreError.

    In a process of its own, unless sqlite_utils is imported here already: with pandas installed it takes 80 MiB, and
    daemons and supervisors live long.
    """
    if "sqlite_utils" in sys.modules:
        _make_here(path, busy_timeout_s)
        return
    words = [sys.executable, "-P", "-m", "autotune.recover.jobs_schema", str(path), str(busy_timeout_s)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise StoreError(said[-1] if said else f"making {path} ended with exit code {done.returncode}: try again")


def _make_here(path: Path, busy_timeout_s: float) -> None:
    with explained(path):
        create_if_missing(path, _build, busy_timeout_s)
        connection = connect(path, "mode=rw", busy_timeout_s)
        try:
            if schema_version(connection) < SCHEMA_VERSION:
                _build(connection)
        finally:
            connection.close()


def _build(connection: sqlite3.Connection) -> None:
    migrate(connection, STEPS, name="jobs", application_id=APPLICATION_ID)


def _main() -> None:
    try:
        _make_here(Path(sys.argv[1]), float(sys.argv[2]))
    except StoreError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
