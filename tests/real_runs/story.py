"""One training twice: with all the memory there is, and under `autotune run` with too little of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autotune.values import MIB
from tests.real_runs.forms import LONG, REPOSITORY, Place, Step, environment
from tests.real_runs.make_data import make_data


@dataclass(frozen=True, slots=True)
class Form:
    """One way to train, and the memory that its long batch may take."""

    name: str
    venv: Path
    command: Callable[[Place], list[str]]
    steps: Callable[[Place], dict[int, Step]]
    margin_mib: int  # over what its first steps hold (VmData): between the long batch at micro batch 4 and at 8


def make(folder: Path) -> Path:
    """The model and the data in `folder`, for all forms."""
    script = [sys.executable, "-m", "tests.real_runs.make_model", str(folder / "model")]
    subprocess.run(script, cwd=REPOSITORY, check=True, timeout=300, capture_output=True)
    make_data(folder / "data", LONG)
    return folder


def a_place(made: Path, folder: Path) -> Place:
    folder.mkdir()
    return Place(folder=folder, model=made / "model", data=made / "data")


@contextmanager
def undisturbed(form: Form, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """The same training with all the memory there is."""
    with (place.folder / "log").open("wb") as log:
        command, environ = form.command(place), environment(form.venv)
        process = subprocess.Popen(command, env=environ, cwd=place.folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
        process.wait(60)


def held_in_first_steps(process: subprocess.Popen[bytes], place: Place) -> int:
    """Most data (VmData) in bytes of the training's largest process, seen up to its third optimizer step."""
    held, until = 0, time.monotonic() + 600
    log = place.folder / "log"
    while log.read_text(errors="replace").count("'loss'") < 3:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < until
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        held = max(held, *map(data_bytes, family))
        time.sleep(0.02)
    return held


def data_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)


def supervised(form: Form, place: Place, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    options = ["--gpu", "cpu", "--memory-limit", f"{limit_bytes // MIB}MiB", "--run-folder", str(place.folder / "run")]
    command = [sys.executable, "-m", "autotune.cli.main", "run", *options, "--", *form.command(place)]
    environ = {**environment(form.venv), "AUTOTUNE_HOME": str(place.folder / "home")}
    return subprocess.run(command, env=environ, cwd=place.folder, capture_output=True, text=True, timeout=800)


def begins(place: Place) -> list[dict[str, Any]]:
    """What the trainer itself said of each attempt's config; of two ranks both."""
    return [event for event in events(place) if event["event"] == "begin"]


def events(place: Place) -> list[dict[str, Any]]:
    """What the trainer said, attempt by attempt."""
    files = sorted((place.folder / "run").glob("attempt-*/events.jsonl"), key=lambda file: int(file.parent.name[8:]))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
