"""A job's supervisor: started in a session of its own, ended by pid, and what it leaves behind when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from autotune.recover.identity import ProcessId
from autotune.recover.job import Job

SupervisorCommand = Callable[[Job], Sequence[str]]

_KILLED_S = 10.0
#: systemd's words to the daemon, which its children must not take for theirs.
_DAEMONS_OWN = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "INVOCATION_ID", "JOURNAL_STREAM", "LISTEN_FDS")


def supervisor_command(job: Job) -> list[str]:
    """`autotune run --job ID`. -P: a user's own folder of some name shadows nothing of ours."""
    return [sys.executable, "-P", "-m", "autotune.cli.main", "run", "--job", str(job.id)]


def supervisor_log(home: Path, job_id: int) -> Path:
    return home / "supervisors" / f"job-{job_id}.log"


def start_supervisor(
    job: Job, words: Sequence[str], *, home: Path, environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start it, to outlive this process. `environ` goes before the job's own. Raises OSError."""
    path = supervisor_log(home, job.id)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in _DAEMONS_OWN}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            words,
            cwd=job.cwd,
            env={**inherited, **job.environ, **environ, "AUTOTUNE_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def end_supervisors(jobs: Sequence[Job], limit_s: float) -> None:
    """SIGTERM to their supervisors, SIGKILL after the limit."""
    processes = [job.supervisor for job in jobs if job.supervisor is not None]
    for process in processes:
        process.send(signal.SIGTERM)
    late = [process for process in processes if not process.wait(limit_s / max(1, len(processes)))]
    for process in late:
        process.send(signal.SIGKILL)
    for process in late:
        process.wait(_KILLED_S)


def end_leftovers(job: Job) -> list[int]:
    """End what a supervisor that is gone left running; gives the pids. The keepers do so at once where they live."""
    from autotune.recover import processes

    return [pid for folder in job.attempt_folders for pid in processes.end_leftovers(folder / processes.PROCESS_FILE)]


def is_gone(supervisor: ProcessId | None) -> bool:
    return supervisor is None or not supervisor.is_alive
