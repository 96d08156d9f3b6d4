"""Tells of a run's end or recovery: a command of the user's, and services through apprise.

The URL of a service is a secret. It is in no row, argument or log: a private file holds it until the job has ended,
and a process of its own reads it there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from autotune.errors import InvalidRequest
from autotune.recover.job import Event, Job

log = logging.getLogger(__name__)

LIMIT_S = 60.0


def hook_words(text: str, option: str) -> tuple[str, ...]:
    """A hook's command as words; no shell ever sees it. Raises InvalidRequest."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidRequest(f"{option} cannot be read as a command ({error}): mend its quotes") from error
    if not words:
        raise InvalidRequest(f"{option} is empty: give a command, or leave it out")
    return words


def keep_url(home: Path, job_id: int, url: str) -> None:
    """Keep the URL to notify for a job, readable by its owner alone. Raises OSError."""
    path = url_file(home, job_id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(f"{url}\n")


def check_url(url: str) -> None:
    """Raises InvalidRequest where apprise is missing or does not know this kind of URL, which is not repeated."""
    if importlib.util.find_spec("apprise") is None:
        raise InvalidRequest("--notify needs apprise: pip install 'autotune-qlora[notify]'")
    import apprise

    if apprise.Apprise.instantiate(url, suppress_exceptions=True) is None:
        raise InvalidRequest("--notify: apprise does not know this kind of URL; its documentation lists them")


def url_file(home: Path, job_id: int) -> Path:
    return home / "notify" / f"job-{job_id}"


def tell(job: Job, event: Event, message: str, *, home: Path, limit_s: float = LIMIT_S) -> threading.Thread:
    """Run the job's hook for this event and notify, without waiting; what fails is logged, and nothing else happens.

    Give the thread a moment (`join`) before the process ends. After an end of the job its URL is forgotten.
    """
    thread = threading.Thread(target=_tell, args=(job, event, message, home, limit_s), name=f"tell {event}")
    thread.start()
    return thread


def _tell(job: Job, event: Event, message: str, home: Path, limit_s: float) -> None:
    url = url_file(home, job.id)
    commands = {f"the hook on {event}": job.hooks.get(event.value, ())}
    if url.exists():
        commands["the notification"] = (sys.executable, "-P", "-m", "autotune.recover.notify_apprise", str(url))
    environ = {**os.environ, **job.environ, **_said(job, event, message)}
    started = {name: _start(name, words, job, environ) for name, words in commands.items() if words}
    until = time.monotonic() + limit_s
    for name, process in started.items():
        if process is not None:
            _wait(f"{job.label}: {name}", process, until, limit_s)
    if event is not Event.RECOVERED:
        url.unlink(missing_ok=True)


def _said(job: Job, event: Event, message: str) -> dict[str, str]:
    return {
        "AUTOTUNE_JOB": str(job.id),
        "AUTOTUNE_JOB_NAME": job.name,
        "AUTOTUNE_EVENT": event.value,
        "AUTOTUNE_MESSAGE": message.replace("\0", ""),
        "AUTOTUNE_RUN_FOLDER": job.run_folder or "",
    }


def _start(name: str, words: Sequence[str], job: Job, environ: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            words,
            cwd=job.cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        log.warning("%s: %s could not be started (%s)", job.label, name, error)
        return None


def _wait(name: str, process: subprocess.Popen[bytes], until: float, limit_s: float) -> None:
    try:
        code = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session, and not reaped yet: nobody else's
        process.wait()
        log.warning("%s took longer than %.0f s and was ended", name, limit_s)
        return
    if code:
        log.warning("%s ended with exit code %d", name, code)
