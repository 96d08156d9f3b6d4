"""`daemon status`: the document of the queue, and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autotune.cli.daemon_process import this_home
from autotune.cli.run_text import counted
from autotune.recover.daemon_file import read_daemon
from autotune.recover.job import ENDED, LIVE, QUEUED, State
from autotune.recover.jobs import open_jobs, utc_now
from autotune.recover.status import document

_RECENT = 20  # ended jobs
_SHOWN = 20  # queued ones, in a terminal
_INCIDENTS = 20
_ORDER = [*LIVE, *QUEUED, *ENDED]


def read(*, everything: bool = False) -> dict[str, Any]:
    """`autotune.status/1` of this home: all that runs or waits, and of what has ended the newest or everything."""
    home = this_home()
    with open_jobs(home) as store:
        jobs = store.jobs(states=(*LIVE, *QUEUED)) + store.jobs(states=ENDED, limit=-1 if everything else _RECENT)
        return document(
            sorted(jobs, key=lambda job: job.id),
            store.incidents(limit=-1 if everything else _INCIDENTS),
            counts=store.counts(),
            incident_counts=store.incident_counts(),
            daemon=read_daemon(home),
            is_alive=lambda process: process.is_alive,
            home=str(home),
            time_utc=utc_now(),
        )


def lines(document: dict[str, Any], *, everything: bool = False) -> list[str]:
    """What a terminal shows: the daemon, the jobs with those that run first, the newest incidents."""
    shown, left_out = listed(document, everything=everything)
    table = _table([_HEADINGS, *(_row(job) for job in shown)]) if shown else []
    more = [f"… and {left_out} more in the queue (--all lists them)"] if left_out else []
    recovered = [incident_line(incident) for incident in document["incidents"][-5:]]
    return [headline(document), *_section(table + more), *_section(recovered)]


def listed(document: dict[str, Any], *, everything: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Jobs in the order of interest, and how many of the queue are left out."""
    jobs = sorted(document["jobs"], key=_interest)
    queued = [job for job in jobs if job["queue_position"] is not None]
    hidden = {job["id"] for job in queued[_SHOWN:]} if not everything else set()
    return [job for job in jobs if job["id"] not in hidden], len(hidden)


def _interest(job: dict[str, Any]) -> tuple[int, int]:
    state = State(job["state"])
    group = 0 if state in LIVE else 1 if job["queue_position"] is not None else 2
    return group, job["queue_position"] or (job["id"] if group == 0 else -job["id"])


def headline(document: dict[str, Any]) -> str:
    """ "Daemon: pid 12 on cuda:0. 1 running, 3 queued." """
    daemon, counts = document["daemon"], document["counts"]
    if daemon["running"]:
        who = f"Daemon: pid {daemon['pid']} on {', '.join(daemon['devices'])}."
    elif daemon["pid"] is not None:
        who = f"The daemon (pid {daemon['pid']}) died: `autotune daemon start` goes on from there."
    else:
        who = "No daemon runs: `autotune daemon start` starts it."
    said = ", ".join(f"{counts[state]} {state}" for state in map(str, _ORDER) if counts.get(state))
    return f"{who} {said or 'No jobs'}."


_HEADINGS = ["ID", "STATE", "NAME", "ON", "STEP", "LEFT", "TOKENS/S", "MEMORY", "INCIDENTS", "COMMAND"]
_RIGHT = {0, 5, 6, 7, 8}


def _row(job: dict[str, Any]) -> list[str]:
    return [
        str(job["id"]),
        state_text(job),
        job["name"][:24] or "-",
        job["device"] or job["gpu"],
        steps_text(job),
        duration_text(job["seconds_left"]),
        f"{job['tokens_per_second']:,.0f}" if job["tokens_per_second"] else "-",
        memory_text(job),
        str(job["incidents"] or "-"),
        word_text(job)[:60],
    ]


def word_text(job: dict[str, Any]) -> str:
    """The newest word about it; where that says no more than its state, its command."""
    says_more = job["message"] and job["message"] != job["state"] and job["state"] != State.FINISHED
    return str(job["message"]) if says_more else " ".join(job["command"])


def state_text(job: dict[str, Any]) -> str:
    """The state; of a live job without supervisor, that too."""
    if job["supervisor"] is not None and not job["supervisor"]["alive"]:
        return f"{job['state']}, supervisor died"
    if job["state"] == State.FAILED and job["exit_code"] is not None:
        return f"failed ({job['exit_code']})"
    return str(job["state"])


def steps_text(job: dict[str, Any]) -> str:
    """ "120/500 24%"."""
    if job["step"] is None:
        return "-"
    return f"{job['step']}/{job['max_steps']} {job['fraction']:.0%}" if job["max_steps"] else str(job["step"])


def memory_text(job: dict[str, Any]) -> str:
    """ "10.2/12.0 GiB"."""
    if job["memory_bytes"] is None:
        return "-"
    limit = f"/{job['memory_limit_bytes'] / 2**30:.1f}" if job["memory_limit_bytes"] else ""
    return f"{job['memory_bytes'] / 2**30:.1f}{limit} GiB"


def duration_text(seconds: float | None) -> str:
    """ "2h05" or "3m10"."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}m{rest:02}"


def incident_line(incident: dict[str, Any]) -> str:
    """ "2026-01-01T00:00:00 job 3: device_oom in train at step 120 → step_down (…); 20 steps done again"."""
    where = f" at step {incident['step']}" if incident["step"] is not None else ""
    lost = f"; {counted(incident['steps_lost'], 'step')} done again" if incident["steps_lost"] else ""
    return (
        f"{incident['time_utc'][:19]} job {incident['job']}: {incident['verdict']} in {incident['phase']}{where}"
        f" → {incident['action']} ({incident['why']}){lost}"
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(len(row[number]) for row in clean) for number in range(len(clean[0]))]
    return [
        "  ".join(
            cell.rjust(width) if number in _RIGHT else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in clean
    ]


def _section(lines: Sequence[str]) -> list[str]:
    return ["", *lines] if lines else []
