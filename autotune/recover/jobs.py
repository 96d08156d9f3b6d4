"""The queue in its SQLite file, `$AUTOTUNE_HOME/jobs.db`: commands write rows, the daemon and its supervisors act.

Every call is one transaction of its own; any number of processes may call at once. The standard library alone reads
and writes; sqlite_utils builds the schema, in a process of its own.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autotune.errors import InvalidRequest, StoreError
from autotune.recover.identity import ProcessId, own_process_id
from autotune.recover.job import ENDED, LIVE, QUEUED, Job, NewJob, State, Waiting
from autotune.recover.jobs_schema import APPLICATION_ID, SCHEMA_VERSION, make
from autotune.recover.private import check_private, kept_environ, masked, refuse_secrets, without_secrets
from gpu_db.home import default_home
from gpu_db.migrations import schema_version, transaction
from gpu_db.sqlite_file import closed_on_error, connect, explained

if TYPE_CHECKING:
    from autotune.recover.facts import Incident

log = logging.getLogger(__name__)

FILE_NAME = "jobs.db"
_COLUMNS = tuple(field.name for field in fields(Job))
_JSON_COLUMNS = ("command", "options", "environ", "hooks", "supervisor")
_FIRST = "state = 'interrupted' DESC, id"  # what was begun goes on before something else begins
#: What a supervisor reports, by `Job`'s names.
_REPORTED = frozenset(
    {
        "phase",
        "step",
        "max_steps",
        "tokens_per_second",
        "step_time_s",
        "loss",
        "memory_bytes",
        "memory_limit_bytes",
        "message",
        "attempts",
        "run_folder",
        "device",
    }
)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def open_jobs(home: Path | None = None, *, busy_timeout_s: float = 30.0) -> JobStore:
    """The queue of `home` (None: `default_home()`), made on first use. Raises StoreError."""
    path = (home or default_home()).absolute() / FILE_NAME
    with explained(path):
        check_private(path.parent, path)
        if not path.exists() or path.stat().st_size == 0:
            make(path, busy_timeout_s)
        with closed_on_error(connect(path, "mode=rw", busy_timeout_s)) as connection:
            if _checked_version(connection, path) < SCHEMA_VERSION:
                make(path, busy_timeout_s)
            return JobStore(connection, path)


def _checked_version(connection: sqlite3.Connection, path: Path) -> int:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError(f"{path} is no queue of autotune's: move it away, or point AUTOTUNE_HOME at another folder")
    version = schema_version(connection)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer autotune (layout {version}, this one knows {SCHEMA_VERSION}): upgrade"
            " autotune, or point AUTOTUNE_HOME at another folder"
        )
    return version


class JobStore:
    """Jobs and incidents. Every method raises StoreError; InvalidRequest where a job is unknown or past it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        """`connection` has isolation_level None; the store owns and closes it."""
        self._connection = connection
        self.path = path
        self._inode = path.stat().st_ino

    @property
    def home(self) -> Path:
        return self.path.parent

    def submit(self, new: NewJob) -> Job:
        """Put it at the end of the queue; on disk when this returns. A command that carries a secret is refused."""
        refuse_secrets(new.command)
        refuse_secrets(new.options)
        for words in new.hooks.values():
            refuse_secrets(words)
        return self._insert(new, kind="job", state=State.QUEUED)

    def register(self, new: NewJob) -> Job:
        """A run that this process supervises without the daemon, so that status shows it; secrets are masked."""
        return self._insert(new, kind="run", state=State.RUNNING, supervisor=own_process_id(), started_utc=utc_now())

    def job(self, job_id: int) -> Job:
        """Raises InvalidRequest where there is none of that id."""
        found = self._jobs("WHERE id = ?", (job_id,))
        if not found:
            raise InvalidRequest(f"there is no job {job_id}: `autotune daemon status --all` lists all")
        return found[0]

    def jobs(self, *, limit: int = -1, states: Iterable[State] = tuple(State)) -> list[Job]:
        """Those in these states, oldest first; of many only the newest `limit`."""
        wanted = [state.value for state in states]
        marks = ", ".join("?" * len(wanted))
        newest = f"SELECT id FROM jobs WHERE state IN ({marks}) ORDER BY id DESC LIMIT ?"
        return self._jobs(f"WHERE id IN ({newest}) ORDER BY id", (*wanted, limit))

    def counts(self) -> dict[State, int]:
        """How many there are in each state that has any."""
        with explained(self.path):
            rows = self._connection.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return {State(state): number for state, number in rows}

    def waiting(self) -> list[Waiting]:
        """What the daemon is to start, in that order."""
        marks = ", ".join(f"'{state}'" for state in QUEUED)
        statement = f"SELECT id, gpu, message FROM jobs WHERE kind = 'job' AND state IN ({marks}) ORDER BY {_FIRST}"
        with explained(self.path):
            return [Waiting(*row) for row in self._connection.execute(statement).fetchall()]

    def claim(self, job_id: int, device: str) -> Job | None:
        """Take it out of the queue, to be started on `device`. None: another process has, or it was cancelled."""
        taken = self._change(
            "state = 'running', device = ?, started_utc = ?, ended_utc = NULL, exit_code = NULL, supervisor = NULL,"
            " step_at_start = step, message = ''",
            (device, utc_now()),
            job_id,
            QUEUED,
        )
        return self.job(job_id) if taken else None

    def attach(self, job_id: int, supervisor: ProcessId) -> bool:
        """Say which process supervises it. False where another one does and lives, or it is not to be run: then leave.

        Both the daemon and the supervisor itself say so: whichever of them is killed, no second one takes the job.
        """
        with explained(self.path), self._durable(), transaction(self._connection):
            job = self.job(job_id)
            other = job.supervisor is not None and job.supervisor != supervisor and job.supervisor.is_alive
            if job.state not in LIVE or other:
                return False
            self._connection.execute("UPDATE jobs SET supervisor = ? WHERE id = ?", (_as_text(supervisor), job_id))
        return True

    def update(self, job_id: int, *, state: State | None = None, **reported: Any) -> State:
        """How far it is; what is None stays. Cheap: not flushed to disk.

        Gives its state: a supervisor stops where that is CANCELLING or no longer `LIVE`.

        `reported`: columns of `Job` that a supervisor knows (step, max_steps, tokens_per_second, message, …).
        """
        if unknown := reported.keys() - _REPORTED:
            raise ValueError(f"not a supervisor's to say: {', '.join(sorted(unknown))}")
        said = {name: without_secrets(value) for name, value in reported.items() if value is not None}
        said["updated_utc"] = utc_now()
        changes = ", ".join(f"{name} = ?" for name in said)
        if state is not None:  # a cancel that was asked for stays asked for
            changes = f"state = CASE state WHEN 'cancelling' THEN state ELSE '{state.value}' END, {changes}"
        self._change(changes, tuple(said.values()), job_id, LIVE, durable=False)
        return self.job(job_id).state

    def finish(
        self, job_id: int, state: State, *, exit_code: int | None = None, message: str = "", seen: Job | None = None
    ) -> Job:
        """It has ended for good, once: a later word changes nothing. `state` is one of `ENDED`.

        `seen`: the row that this is said of. Where another supervisor has it by now, nothing changes.
        """
        if state not in ENDED:
            raise ValueError(f"{state} is no end")
        if self._is_anothers(job_id):
            return self.job(job_id)
        self._change(
            "state = ?, ended_utc = ?, exit_code = ?, message = ?, supervisor = NULL",
            (state.value, utc_now(), exit_code, without_secrets(message)),
            job_id,
            (*LIVE, *QUEUED),
            seen=seen,
        )
        return self.job(job_id)

    def interrupt(self, job_id: int, message: str, *, restarts: int = 0, seen: Job | None = None) -> Job:
        """Its supervisor ends or has ended without an end of the run: it is to be resumed, or was to be cancelled.

        `seen` as for `finish`.
        """
        if self._is_anothers(job_id):
            return self.job(job_id)
        self._change(
            "state = CASE state WHEN 'cancelling' THEN 'cancelled' ELSE 'interrupted' END,"
            " message = CASE state WHEN 'cancelling' THEN 'cancelled' ELSE ? END,"
            " ended_utc = ?, restarts = ?, supervisor = NULL",
            (message, utc_now(), restarts),
            job_id,
            LIVE,
            seen=seen,
        )
        return self.job(job_id)

    def cancel(self, job_id: int) -> Job:
        """A queued one is cancelled at once, a live one is CANCELLING until its supervisor has ended.

        Raises InvalidRequest for one that has ended.
        """
        changed = self._change(
            "state = 'cancelled', message = 'cancelled before it was started', ended_utc = ?",
            (utc_now(),),
            job_id,
            QUEUED,
        ) or self._change("state = 'cancelling', message = 'a cancel was asked for'", (), job_id, LIVE)
        job = self.job(job_id)
        if not changed:
            raise InvalidRequest(f"{job.label} is {job.state} already: there is nothing to cancel")
        return job

    def say(self, job_id: int, message: str) -> None:
        """A word about a job that waits."""
        self._change("message = ?", (message,), job_id, QUEUED, durable=False)

    def add_incident(self, job_id: int, incident: Incident) -> None:
        from autotune.values import to_json

        row = {
            "job_id": job_id,
            "number": incident.number,
            "attempt": incident.attempt,
            "time_utc": incident.time_utc,
            "verdict": incident.judgement.verdict.value,
            "action": incident.decision.action.value,
            "phase": incident.phase.value,
            "step": incident.step,
            "steps_lost": incident.steps_lost,
            "seconds_lost": incident.seconds_lost,
            "resumed_from": incident.resumed_from,
            "message": without_secrets(incident.message),
            "incident": json.dumps(without_secrets(to_json(incident))),
        }
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        with explained(self.path), self._durable(), transaction(self._connection):
            self._connection.execute(f"INSERT INTO incidents ({names}) VALUES ({values})", row)

    def incidents(self, job_id: int | None = None, *, limit: int = -1) -> list[tuple[int, Incident]]:
        """With their job's id, oldest first; of many only the newest `limit`. None: of every job."""
        with explained(self.path):
            rows = self._connection.execute(
                "SELECT id, job_id, incident FROM incidents WHERE job_id = coalesce(?, job_id)"
                " ORDER BY id DESC LIMIT ?",
                (job_id, limit),
            ).fetchall()
        found = ((of, _incident(number, text)) for number, of, text in reversed(rows))
        return [(of, incident) for of, incident in found if incident is not None]

    def incident_counts(self) -> dict[int, int]:
        """Job id → how many incidents it had."""
        with explained(self.path):
            return dict(self._connection.execute("SELECT job_id, count(*) FROM incidents GROUP BY job_id").fetchall())

    def data_version(self) -> int:
        """Another number after each change that another process has made."""
        with explained(self.path):
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def is_in_place(self) -> bool:
        """Whether the file that is open here is still the one of that name; it may have been moved away."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _insert(
        self,
        new: NewJob,
        *,
        kind: str,
        state: State,
        supervisor: ProcessId | None = None,
        started_utc: str | None = None,
    ) -> Job:
        row = {
            "kind": kind,
            "name": new.name,
            "state": state.value,
            "command": json.dumps(masked(new.command)),
            "cwd": new.cwd,
            "options": json.dumps(masked(new.options)),
            "environ": json.dumps(kept_environ(new.environ)),
            "hooks": json.dumps({event: masked(words) for event, words in new.hooks.items()}),
            "gpu": new.gpu,
            "submitted_utc": utc_now(),
            "started_utc": started_utc,
            "supervisor": _as_text(supervisor),
        }
        names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        with explained(self.path), self._durable(), transaction(self._connection):
            cursor = self._connection.execute(f"INSERT INTO jobs ({names}) VALUES ({values})", row)
        return self.job(int(cursor.lastrowid or 0))

    def _change(
        self,
        changes: str,
        values: tuple[Any, ...],
        job_id: int,
        states: Iterable[State],
        *,
        durable: bool = True,
        seen: Job | None = None,
    ) -> bool:
        """Change the row if it is in one of these states and, of `seen`, has the same supervisor; whether it did."""
        marks = ", ".join(f"'{state}'" for state in states)
        statement = f"UPDATE jobs SET {changes} WHERE id = ? AND state IN ({marks})"
        values = (*values, job_id)
        if seen is not None:
            statement, values = f"{statement} AND supervisor IS ?", (*values, _as_text(seen.supervisor))
        with explained(self.path), self._durable(durable), transaction(self._connection):
            return self._connection.execute(statement, values).rowcount == 1

    def _is_anothers(self, job_id: int) -> bool:
        """Whether a living process that is not this one supervises it: its end is then not this one's to say."""
        supervisor = self.job(job_id).supervisor
        return supervisor is not None and supervisor != own_process_id() and supervisor.is_alive

    @contextmanager
    def _durable(self, flush: bool = True) -> Iterator[None]:
        """A commit in it survives a power failure; without `flush` only the death of every process."""
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
        yield

    def _jobs(self, where: str, values: tuple[Any, ...]) -> list[Job]:
        with explained(self.path):
            rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs {where}", values).fetchall()
        return [job for job in map(_job, rows) if job is not None]


def _as_text(process: ProcessId | None) -> str | None:
    return None if process is None else json.dumps(asdict(process))


def _job(row: tuple[Any, ...]) -> Job | None:
    data = dict(zip(_COLUMNS, row, strict=True))
    try:
        data.update({name: json.loads(data[name]) for name in _JSON_COLUMNS if data[name] is not None})
        supervisor = data["supervisor"]
        data.update(
            state=State(data["state"]),
            command=tuple(data["command"]),
            options=tuple(data["options"]),
            hooks={event: tuple(words) for event, words in data["hooks"].items()},
            supervisor=ProcessId(**supervisor) if supervisor else None,
        )
        return Job(**data)
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("job %s cannot be read (%s), skipped", data["id"], error)
        return None


def _incident(number: int, text: str) -> Incident | None:
    from autotune.recover.facts import Incident  # a tenth of a second that a queue without incidents does not pay
    from autotune.values import from_json

    try:
        return from_json(Incident, json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("incident %s cannot be read (%s), skipped", number, error)
        return None
