"""The schema of the queue's database, as the ordered steps that build it."""

from __future__ import annotations

import sqlite3
from typing import Any

from gpu_db.migrations import Step, migrate

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


def build(connection: sqlite3.Connection) -> None:
    """Apply the steps that are missing. Raises sqlite3.Error."""
    migrate(connection, STEPS, name="jobs", application_id=APPLICATION_ID)
