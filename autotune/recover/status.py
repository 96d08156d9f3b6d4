"""What the queue looks like, as data: rows in, one document out. The terminal and any page show this and no more.

Schema `autotune.status/1`, unknown is null, memory in bytes, time in seconds, times of day in UTC (ISO 8601):

    schema, time_utc, home
    daemon     running, pid, since_utc, version, devices, share; all null but `running` where none runs
    counts     state → number of all jobs, those that are not listed included
    jobs       id, name, kind ("job": the daemon's, "run": an `autotune run` of its own), state, message, command,
               cwd, options, gpu (asked), device (given), submitted_utc, started_utc, ended_utc, updated_utc, exit_code,
               supervisor {pid, alive}, run_folder, attempts, restarts, incidents (how many), queue_position (from 1),
               phase, step, max_steps, fraction, seconds_left, step_time_s, tokens_per_second, loss, memory_bytes,
               memory_limit_bytes
    incidents  newest last, each with job, number, attempt, time_utc, verdict, evidence, action, why, change, phase,
               ended_by, step, resumed_from, steps_lost, seconds_lost, message
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autotune.recover.daemon_file import DaemonFacts
from autotune.recover.identity import ProcessId
from autotune.recover.job import LIVE, QUEUED, Job, State

if TYPE_CHECKING:
    from autotune.recover.facts import Incident

SCHEMA = "autotune.status/1"

_COPIED = (
    "id",
    "name",
    "kind",
    "state",
    "message",
    "command",
    "cwd",
    "options",
    "gpu",
    "device",
    "submitted_utc",
    "started_utc",
    "ended_utc",
    "updated_utc",
    "exit_code",
    "run_folder",
    "attempts",
    "restarts",
    "phase",
    "step",
    "max_steps",
    "step_time_s",
    "tokens_per_second",
    "loss",
    "memory_bytes",
    "memory_limit_bytes",
)


def document(
    jobs: Sequence[Job],
    incidents: Sequence[tuple[int, Incident]],
    *,
    counts: Mapping[State, int],
    incident_counts: Mapping[int, int],
    daemon: DaemonFacts | None,
    is_alive: Callable[[ProcessId], bool],
    home: str,
    time_utc: str,
) -> dict[str, Any]:
    """The whole state. `jobs` is what is to be listed, in order of id, every queued one before others in it."""
    queue = sorted((job for job in jobs if job.kind == "job" and job.state in QUEUED), key=_queue_order)
    positions = {job.id: number for number, job in enumerate(queue, start=1)}
    return {
        "schema": SCHEMA,
        "time_utc": time_utc,
        "home": home,
        "daemon": daemon_entry(daemon, is_alive),
        "counts": {state.value: number for state, number in counts.items()},
        "jobs": [
            {
                **job_entry(job, is_alive),
                "incidents": incident_counts.get(job.id, 0),
                "queue_position": positions.get(job.id),
            }
            for job in jobs
        ],
        "incidents": [incident_entry(job_id, incident) for job_id, incident in incidents],
    }


def _queue_order(job: Job) -> tuple[bool, int]:
    return job.state is not State.INTERRUPTED, job.id


def daemon_entry(daemon: DaemonFacts | None, is_alive: Callable[[ProcessId], bool]) -> dict[str, Any]:
    """Of one that died without a word, `running` is false and the pid is its."""
    if daemon is None:
        return {"running": False, "pid": None, "since_utc": None, "version": None, "devices": None, "share": None}
    return {
        "running": is_alive(daemon.process),
        "pid": daemon.process.pid,
        "since_utc": daemon.since_utc,
        "version": daemon.version,
        "devices": list(daemon.devices),
        "share": daemon.share,
    }


def job_entry(job: Job, is_alive: Callable[[ProcessId], bool]) -> dict[str, Any]:
    entry = {name: getattr(job, name) for name in _COPIED}
    return {
        **entry,
        "state": job.state.value,
        "command": list(job.command),
        "options": list(job.options),
        "supervisor": _supervisor(job, is_alive),
        "fraction": _fraction(job),
        "seconds_left": _seconds_left(job),
    }


def _supervisor(job: Job, is_alive: Callable[[ProcessId], bool]) -> dict[str, Any] | None:
    if job.state not in LIVE or job.supervisor is None:
        return None
    return {"pid": job.supervisor.pid, "alive": is_alive(job.supervisor)}


def _fraction(job: Job) -> float | None:
    return job.step / job.max_steps if job.step is not None and job.max_steps else None


def _seconds_left(job: Job) -> float | None:
    """Of training at the newest pace; evaluations and saves are not in it."""
    if job.state not in LIVE or job.step is None or not job.max_steps or job.step_time_s is None:
        return None
    return max(0, job.max_steps - job.step) * job.step_time_s


def incident_entry(job_id: int, incident: Incident) -> dict[str, Any]:
    return {
        "job": job_id,
        "number": incident.number,
        "attempt": incident.attempt,
        "time_utc": incident.time_utc,
        "verdict": incident.judgement.verdict.value,
        "evidence": list(incident.judgement.evidence),
        "action": incident.decision.action.value,
        "why": incident.decision.why,
        "change": dict(incident.decision.change),
        "phase": incident.phase.value,
        "ended_by": incident.ended_by.value,
        "step": incident.step,
        "resumed_from": incident.resumed_from,
        "steps_lost": incident.steps_lost,
        "seconds_lost": incident.seconds_lost,
        "message": incident.message,
    }
