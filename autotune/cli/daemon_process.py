"""`daemon start`, `stop` and `cancel`: the daemon as a process, and signals to jobs where none runs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from autotune.errors import AutotuneError, InvalidRequest
from autotune.recover.daemon_file import DaemonFacts, only_daemon, read_daemon
from autotune.recover.job import LIVE, Job, State
from autotune.recover.jobs import JobStore, open_jobs
from autotune.recover.supervisors import end_leftovers, end_supervisors, is_gone
from gpu_db.home import default_home

_START_S = 150.0  # reading the devices is most of it
_STOP_S = 90.0  # a hook may take a minute
_JOBS_S = 120.0
_MAX_LOG_BYTES = 2**20


def this_home() -> Path:
    return default_home().absolute()


def running_daemon(home: Path) -> DaemonFacts | None:
    """The one that runs now."""
    found = read_daemon(home)
    return found if found is not None and found.process.is_alive else None


def serve_here(share: int) -> None:
    """Be the daemon until a signal."""
    from autotune.recover.daemon import DaemonLimits, serve
    from autotune.recover.slots import read_slots

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    serve(this_home(), read_slots, limits=DaemonLimits(share=share))


def start_detached(share: int) -> str:
    """Start it in a session of its own; gives a line once it serves. Raises AutotuneError with what it said."""
    home = this_home()
    with only_daemon(home):  # a second one is refused here and now; ours takes the lock in a moment
        pass
    path = _log(home)
    words = [sys.executable, "-P", "-m", "autotune.cli.main", "daemon", "start", "--foreground", "--share", str(share)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        child = subprocess.Popen(
            words,
            cwd=home,
            env={**os.environ, "AUTOTUNE_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        facts = running_daemon(home)
        if facts is not None and facts.process.pid == child.pid:
            return f"The daemon runs (pid {child.pid}) on {', '.join(facts.devices)}; it logs to {path}."
        if child.poll() is not None:
            raise AutotuneError(_last_words(path))
        time.sleep(0.05)
    child.kill()
    raise AutotuneError(f"the daemon did not begin to serve within {_START_S:.0f} s and was ended: {path} says why")


def _log(home: Path) -> Path:
    path = home / "daemon.log"
    if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
        path.replace(path.with_name("daemon.log.1"))
    return path


def _last_words(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("Error: ") if lines else "the daemon ended at once and said nothing"


def stop(*, jobs: bool) -> Iterator[str]:
    """End the daemon, and with `jobs` the supervisors; a line for each thing done."""
    home = this_home()
    facts = read_daemon(home)
    alive = facts is not None and facts.process.is_alive
    if facts is not None and alive:
        facts.process.send(signal.SIGTERM)
        if not facts.process.wait(_STOP_S):
            facts.process.send(signal.SIGKILL)  # it may: what matters is in the rows
        yield f"The daemon (pid {facts.process.pid}) has ended."
    elif not jobs:
        last = f" (the last one, pid {facts.process.pid}, died; `autotune daemon start` goes on)" if facts else ""
        raise InvalidRequest(f"no daemon runs in {home}: there is nothing to stop{last}")
    with open_jobs(home) as store:
        live = [job for job in store.jobs(states=LIVE) if job.kind == "job"]
        if jobs:
            _interrupt(store, live)
            left = [job for job in live if store.job(job.id).state is State.INTERRUPTED]
            yield f"Interrupted, to be resumed by the next daemon: {_names(left)}."
        elif live:
            yield f"Going on without it: {_names(live)}; --jobs would have interrupted them."


def _names(jobs: list[Job]) -> str:
    return ", ".join(job.label for job in jobs) or "no job"


def _interrupt(store: JobStore, live: list[Job]) -> None:
    end_supervisors(live, _JOBS_S)
    for job in live:
        end_leftovers(job)
        store.interrupt(job.id, "interrupted by `autotune daemon stop --jobs`: to be resumed")


def cancel(job_id: int) -> str:
    """Ask for it; where no daemon runs, see to it here."""
    home = this_home()
    with open_jobs(home) as store:
        job = store.cancel(job_id)
        if job.state is State.CANCELLED:
            return f"{_named(job)} is cancelled."
        if running_daemon(home) is not None:
            return f"{_named(job)} is being cancelled: it gets time to save first."
        if job.supervisor is not None and not is_gone(job.supervisor):
            job.supervisor.send(signal.SIGTERM)
            return f"{_named(job)} was asked to end (no daemon runs to see that it does)."
        end_leftovers(job)
        store.finish(job_id, State.CANCELLED, message="cancelled after its supervisor had died")
        return f"{_named(job)} is cancelled: its supervisor had died already."


def _named(job: Job) -> str:
    return f"J{job.label[1:]}"
