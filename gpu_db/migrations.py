"""The schema of a GPU database, as the ordered steps that build it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: `PRAGMA application_id` of a GPU database: "atun" in ASCII. Another program's SQLite file has another one.
APPLICATION_ID = 0x6174756E

Step = Callable[[Any], None]  # given a sqlite_utils.Database


def create_tables(db: Any) -> None:
    """Schema 1: trials and the requests they answer, both append only, and the device the file is about."""
    db["trials"].create(
        {
            "id": int,
            "time_utc": str,
            "request_id": str,
            "model_name": str,
            "model_fingerprint": str,
            "verdict": str,
            "origin": str,
            "sequence_length": int,
            "micro_batch_size": int,
            "gradient_accumulation_steps": int,
            "gradient_checkpointing": str,
            "attention": str,
            "optimizer": str,
            "loss": str,
            "memory_limit_bytes": int,
            "peak_allocated_bytes": int,
            "peak_reserved_bytes": int,
            "device_used_bytes": int,
            "environment_fingerprint": str,
            "config": str,
            "report": str,
            "judgement": str,
            "environment": str,
            "prediction": str,
            "moves": str,
        },
        pk="id",
        not_null={"time_utc", "request_id", "model_fingerprint", "config", "report", "judgement", "environment"},
    )
    db["trials"].create_index(["request_id"])
    db["trials"].create_index(["model_fingerprint"])
    db["requests"].create({"request_id": str, "request": str}, pk="request_id", not_null={"request"})
    db["meta"].create({"device_name": str, "device_kind": str, "device_total_bytes": int, "device_mig": str})
    for table in ("trials", "requests"):
        for action in ("UPDATE", "DELETE"):
            db.execute(
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table}"
                f" BEGIN SELECT RAISE(ABORT, '{table} are append only'); END"
            )
    db.execute(  # INSERT OR REPLACE deletes the old row without firing delete triggers
        "CREATE TRIGGER trials_no_replace BEFORE INSERT ON trials WHEN NEW.id IN (SELECT id FROM trials)"
        " BEGIN SELECT RAISE(ABORT, 'trials are append only'); END"
    )


#: A released step never changes; a new schema is a new step at the end.
STEPS: tuple[Step, ...] = (create_tables,)
SCHEMA_VERSION = len(STEPS)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. Takes the write lock at once: a read that becomes a write later is refused without waiting."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled back already
            connection.execute("ROLLBACK")
        raise


def schema_version(connection: sqlite3.Connection) -> int:
    """How many steps this file has had. `PRAGMA user_version`, so that reading it does not import sqlite_utils."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(
    connection: sqlite3.Connection,
    steps: Sequence[Step] = STEPS,
    *,
    name: str = "gpu_db",
    application_id: int = APPLICATION_ID,
) -> None:
    """Apply the steps that are missing, all or none; processes that do so at once wait for each other.

    `connection` has isolation_level None. Raises sqlite3.Error; the file is then as it was.
    """
    from sqlite_utils import Database, Migrations

    migrations = Migrations(name)
    for step in steps:
        migrations()(step)
    with transaction(connection):
        if schema_version(connection) < len(steps):
            migrations.apply(Database(connection, execute_plugins=False))
            connection.execute(f"PRAGMA application_id = {application_id}")
            connection.execute(f"PRAGMA user_version = {len(steps)}")
