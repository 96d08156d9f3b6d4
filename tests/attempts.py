"""Small commands run as attempts, with nothing of theirs on the tests' own output."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autotune.recover.facts import Ended, Launch, Progress
from autotune.recover.keeper import read_processes
from autotune.recover.output import Output
from autotune.recover.stop import StopRequests
from autotune.recover.supervise import run_attempt
from autotune.recover.watching import AttemptLimits
from autotune.values import Device

QUICK = AttemptLimits(grace_s=5.0, end_grace_s=1.0, rank_grace_s=2.0, look_s=0.2)


def python(body: str, *words: str) -> tuple[str, ...]:
    """A command that runs `body`; it can say `tell(event, **fields)`."""
    return (sys.executable, "-S", "-c", _TELL + textwrap.dedent(body), *words)


_TELL = """
import json, os, signal, subprocess, sys, time
_rank = int(os.environ.get("RANK", "0"))
def tell(event, **fields):
    line = json.dumps({"event": event, "time": time.time(), "pid": os.getpid(), "rank": _rank, **fields})
    with open(os.path.join(os.environ["AUTOTUNE_ATTEMPT"], "events.jsonl"), "a") as file:
        file.write(line + "\\n")
def steps(first, count, seconds=0.01):
    for step in range(first, first + count):
        tell("step", step=step, seconds=seconds)
"""


class Attempt:
    """One attempt in a folder of the test; its output goes into files."""

    def __init__(self, folder: Path, *, limits: AttemptLimits = QUICK) -> None:
        self.folder, self.cwd, self.limits = folder, folder, limits
        self.stop = StopRequests()
        self.progress: list[Progress] = []
        self.watch: Callable[[], Device | None] = lambda: None
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self.log = folder / "output.log"

    def run(self, argv: tuple[str, ...], environ: Mapping[str, str] | None = None, **options: Any) -> Ended:
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            output = Output(self.log, stdout=out.fileno(), stderr=err.fileno(), **options)
            with contextlib.closing(output):
                return self.run_with(output, argv, environ)

    def run_with(self, output: Output, argv: tuple[str, ...], environ: Mapping[str, str] | None = None) -> Ended:
        return run_attempt(
            Launch(argv=argv, environ=dict(environ or {})),
            folder=self.folder,
            number=1,
            cwd=self.cwd,
            environ=os.environ,
            limits=self.limits,
            stop=self.stop,
            watch=self.watch,
            on_progress=self.progress.append,
            output=output,
        )

    @property
    def place(self) -> Path:
        return self.folder / "attempt-1"

    def when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        """Do something beside the attempt once a condition holds."""

        def beside() -> None:
            wait_until(condition)
            action()

        threading.Thread(target=beside, daemon=True).start()


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.02)


def living(mark: str) -> list[int]:
    """Pids of living processes with this word in their command line."""
    found = []
    for process in read_processes().values():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if process.alive and mark.encode() in words.split(b"\0") and process.pid != os.getpid():
                found.append(process.pid)
    return found
