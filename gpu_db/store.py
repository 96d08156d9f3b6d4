"""Trials of one GPU model in its SQLite file: appended, committed, read back.

Reading and appending use the standard library alone; sqlite_utils builds and upgrades the schema, and is imported
only then, because its import (0.5 s with pandas installed) would be most of an answer from the database.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from autotune.errors import StoreError
from autotune.values import Device, FitRequest, TrialRecord, from_json, to_json
from gpu_db.anonymous import anonymous, public_model_name
from gpu_db.home import default_home as default_home
from gpu_db.migrations import APPLICATION_ID, SCHEMA_VERSION, migrate, schema_version, transaction
from gpu_db.sqlite_file import closed_on_error, connect, create_if_missing, explained

log = logging.getLogger(__name__)

_RECORD_COLUMNS = ("time_utc", "request_id", "model_name", "model_fingerprint", "origin", "memory_limit_bytes")
_CONFIG_COLUMNS = (
    "sequence_length",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "attention",
    "optimizer",
    "loss",
)
_REPORT_COLUMNS = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
_JSON_COLUMNS = ("config", "report", "judgement", "environment", "prediction", "moves")

_FOREIGN = "{path} is not a GPU database of autotune: move it away, or point AUTOTUNE_HOME at another folder"


def database_path(home: Path | None, device: Device) -> Path:
    """The file of `device`, whether it exists or not. `home` None: `default_home()`."""
    return (home or default_home()) / "gpus" / f"{device.slug}.db"


def open_store(home: Path | None, device: Device, *, writable: bool = True, busy_timeout_s: float = 60.0) -> GpuStore:
    """The store of `device`'s model, made on first use. `busy_timeout_s`: seconds to wait for another process.

    Not `writable`: nothing is created or changed, and a read-only disk will do. Raises StoreError.
    """
    path = database_path(home, device)
    with explained(path):
        if path.is_dir():
            raise StoreError(_FOREIGN.format(path=path))
        if writable:
            _create_if_missing(path, device, busy_timeout_s)
            return GpuStore(_open_to_write(path, busy_timeout_s), path)
    return read_store(path, device.name, busy_timeout_s=busy_timeout_s)


def read_store(path: Path, device_name: str, *, busy_timeout_s: float = 60.0) -> GpuStore:
    """The store in this file, to read. Raises StoreError."""
    with explained(path):
        if not path.exists():
            raise StoreError(f"nothing is stored about {device_name} yet ({path} does not exist): run autotune fit")
        return GpuStore(_open_to_read(path, busy_timeout_s), path)


def stored_databases(home: Path | None = None) -> list[Path]:
    """The databases that exist; the name of each is its device's slug. `home` None: `default_home()`."""
    return sorted(((home or default_home()) / "gpus").glob("*.db"))


class GpuStore:
    """Trials of one GPU model. A `TrialStore`; every method raises StoreError, and what is stored stays stored."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """`connection` has isolation_level None; the store owns and closes it."""
        connection.text_factory = bytes  # text that is no longer UTF-8 costs its row, not the query
        self._connection = connection
        self.path = path

    def append(self, trial: TrialRecord) -> TrialRecord:
        """Committed to disk when this returns; gives the trial back with its row id.

        What names a person or machine (paths, UUIDs, host and user name in messages) is not written.
        """
        if trial.device_slug != self.path.stem:
            raise StoreError(f"a trial of {trial.device_slug} does not belong in {self.path}: open that device's store")
        row = _to_row(trial)
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        with explained(self.path), transaction(self._connection):
            cursor = self._connection.execute(f"INSERT INTO trials ({names}) VALUES ({values})", row)
        return replace(trial, id=cursor.lastrowid)

    def trials(
        self,
        *,
        model_fingerprint: str | None = None,
        request_id: str | None = None,
        environment_fingerprint: str | None = None,
        latest: int = -1,
    ) -> list[TrialRecord]:
        """Matching trials, oldest first; of many only the `latest`. A row that cannot be understood is skipped, with a
        warning."""
        wanted = {
            "model_fingerprint": model_fingerprint,
            "request_id": request_id,
            "environment_fingerprint": environment_fingerprint,
        }
        stated = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in stated) or "1"
        columns = ("id", *_RECORD_COLUMNS, *_JSON_COLUMNS)
        with explained(self.path):
            rows = self._connection.execute(
                f"SELECT {', '.join(columns)} FROM trials WHERE {where} ORDER BY id DESC LIMIT :latest",
                {**stated, "latest": latest},
            ).fetchall()
        found = (self._from_row(dict(zip(columns, row, strict=True))) for row in reversed(rows))
        return [trial for trial in found if trial is not None]

    def add_request(self, request_id: str, request: FitRequest) -> None:
        """Keep what was asked, once; a request that is known already is left as it is."""
        data = to_json(request)
        model = data["model"]
        model.update(name=public_model_name(model["name"]), folder=None)
        model["config"].pop("_name_or_path", None)
        with explained(self.path), transaction(self._connection):
            self._connection.execute(
                "INSERT OR IGNORE INTO requests (request_id, request) VALUES (?, ?)", (request_id, json.dumps(data))
            )

    def request(self, request_id: str) -> FitRequest | None:
        """What was asked under this id; None where it is unknown or cannot be understood."""
        with explained(self.path):
            row = self._connection.execute(
                "SELECT request FROM requests WHERE request_id = ?", (request_id,)
            ).fetchone()
        try:
            return None if row is None else from_json(FitRequest, json.loads(row[0]))
        except _UNREADABLE as error:
            log.warning("%s: request %s cannot be read (%s)", self.path, request_id, error)
            return None

    def close(self) -> None:
        """Move the write-ahead log into the file, as far as other processes allow, and close it."""
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:  # read only, a full disk, closed before: all is safe in the log
            log.debug("%s: not checkpointed (%s)", self.path, error)
        self._connection.close()

    def __enter__(self) -> GpuStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _from_row(self, row: dict[str, Any]) -> TrialRecord | None:
        try:
            data = {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
            data.update({name: json.loads(data[name]) for name in _JSON_COLUMNS})
            return from_json(TrialRecord, {**data, "device_slug": self.path.stem})
        except _UNREADABLE as error:
            log.warning("%s: trial %s cannot be read (%s), skipped", self.path, row["id"], error)
            return None


#: What reading damaged or newer JSON as a value can raise.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _to_row(trial: TrialRecord) -> dict[str, Any]:
    data = to_json(trial)
    config, report, judgement = data["config"], anonymous(data["report"]), anonymous(data["judgement"])
    return {
        **{name: data[name] for name in _RECORD_COLUMNS},
        **{name: config[name] for name in _CONFIG_COLUMNS},
        **{name: report[name] for name in _REPORT_COLUMNS},
        "model_name": public_model_name(trial.model_name),
        "verdict": judgement["verdict"],
        "environment_fingerprint": trial.environment.fingerprint,
        **{name: json.dumps(data[name]) for name in _JSON_COLUMNS},
        "report": json.dumps(report),
        "judgement": json.dumps(judgement),
    }


def _create_if_missing(path: Path, device: Device, timeout_s: float) -> None:
    def build(connection: sqlite3.Connection) -> None:
        migrate(connection)
        connection.execute(
            "INSERT INTO meta (device_name, device_kind, device_total_bytes, device_mig) VALUES (?, ?, ?, ?)",
            (device.name, device.kind, device.total_bytes, device.mig),
        )

    create_if_missing(path, build, timeout_s)


def _open_to_write(path: Path, timeout_s: float) -> sqlite3.Connection:
    with closed_on_error(connect(path, "mode=rw", timeout_s)) as connection:
        if _checked_version(connection, path) < SCHEMA_VERSION:
            migrate(connection)
        connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power failure
        with transaction(connection):  # not writable: say so now, not after the first probe
            pass
        return connection


def _open_to_read(path: Path, timeout_s: float) -> sqlite3.Connection:
    try:
        connection = connect(path, "mode=ro", timeout_s)
        schema_version(connection)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        log.debug("%s: its folder is read-only, read as a file that does not change", path)
        if Path(f"{path}-wal").exists():
            log.warning("%s: its newest trials are in %s-wal, which cannot be read in a read-only folder", path, path)
        connection = connect(path, "immutable=1", timeout_s)
    with closed_on_error(connection):
        if _checked_version(connection, path) < SCHEMA_VERSION:
            raise StoreError(f"{path} has an older layout and is read-only: run autotune once where it can be written")
        return connection


def _checked_version(connection: sqlite3.Connection, path: Path) -> int:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(_FOREIGN.format(path=path))
    version = schema_version(connection)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer autotune (layout {version}, this one knows {SCHEMA_VERSION}):"
            " upgrade autotune, or point AUTOTUNE_HOME at another folder"
        )
    return version
