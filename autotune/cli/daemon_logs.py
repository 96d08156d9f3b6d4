"""`daemon logs`: what a job wrote, as it is, and as it grows."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import BinaryIO

from autotune.errors import InvalidRequest
from autotune.recover.job import LIVE, QUEUED, Job
from autotune.recover.jobs import JobStore, open_jobs
from autotune.recover.supervisors import supervisor_log

_EVERY_S = 0.3
_CHUNK = 1 << 16


def show(job_id: int, which: str, *, follow: bool) -> None:
    """Print it to stdout. Raises InvalidRequest where nothing is there and nothing is to come."""
    with open_jobs() as store:
        job = store.job(job_id)
        path = log_path(store.home, job, which)
        if not follow:
            if path is None or not path.exists():
                raise InvalidRequest(_nothing(job, which))
            with path.open("rb") as file:
                _print_new(file)
            return
        _follow(store, job_id, which)


def log_path(home: Path, job: Job, which: str) -> Path | None:
    if which == "supervisor":
        return supervisor_log(home, job.id)
    names = {"output": "output.log", "report": "report.md"}
    return Path(job.run_folder) / names[which] if job.run_folder else None


def _nothing(job: Job, which: str) -> str:
    if which == "report":
        return f"{job.label} has no report: nothing was recovered so far"
    if job.state in QUEUED:
        return f"{job.label} is {job.state} and has written nothing yet: --follow waits for it"
    other = "" if which == "supervisor" else f": `autotune daemon logs {job.id} --supervisor` may say why"
    return f"{job.label} has written no {which}{other}"


def _follow(store: JobStore, job_id: int, which: str) -> None:
    """Until the job has ended and all is printed; a file that was rotated away is followed by its successor."""
    file: BinaryIO | None = None
    try:
        while True:
            job = store.job(job_id)
            path = log_path(store.home, job, which)
            if file is not None:
                _print_new(file)
            if path is not None and path.exists() and (file is None or _is_another(file, path)):
                if file is not None:
                    file.close()
                file = path.open("rb")
                _print_new(file)
            if job.state not in (*LIVE, *QUEUED):
                return
            time.sleep(_EVERY_S)
    finally:
        if file is not None:
            file.close()


def _is_another(file: BinaryIO, path: Path) -> bool:
    opened, named = Path(f"/dev/fd/{file.fileno()}").stat(), path.stat()
    return opened.st_ino != named.st_ino or named.st_size < file.tell()


def _print_new(file: BinaryIO) -> None:
    while chunk := file.read(_CHUNK):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
