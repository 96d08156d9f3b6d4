"""Real trainers that die of real out-of-memory under `autotune run` end as if they had not, old and new ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from autotune.values import MIB
from tests.real_runs.forms import (
    LONG,
    MICRO_BATCH,
    REPOSITORY,
    Place,
    Step,
    environment,
    last_state,
    trainer_command,
    trainer_steps,
    trl_command,
    trl_steps,
)
from tests.real_runs.make_data import SAMPLES, make_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = SAMPLES // MICRO_BATCH


@dataclass(frozen=True, slots=True)
class Form:
    """One way to train, and the memory that its long batch may take."""

    name: str
    venv: Path
    command: Callable[[Place], list[str]]
    steps: Callable[[Place], dict[int, Step]]
    margin_mib: int  # over what its first steps hold (VmData): between the long batch at micro batch 4 and at 8


# Margins: what was held more than in the first steps when the long batch passed, one thread, torch 2.13.0 CPU build
TRAINER, TRL = (trainer_command, trainer_steps), (trl_command, trl_steps)
NEWEST, OLDEST = Path(sys.prefix), REPOSITORY / ".venv-457"
FORMS = [
    Form("trainer-newest", NEWEST, *TRAINER, 480),
    Form("trl-newest", NEWEST, *TRL, 1300),
    Form("trainer-4.57", OLDEST, *TRAINER, 480),
    Form("trl-4.57", OLDEST, *TRL, 480),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the data, for all forms."""
    folder = tmp_path_factory.mktemp("real")
    make = [sys.executable, "-m", "tests.real_runs.make_model", str(folder / "model")]
    subprocess.run(make, cwd=REPOSITORY, check=True, timeout=300, capture_output=True)
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


def begins(place: Place) -> list[dict[str, int]]:
    """What the trainer itself said of each attempt's config."""
    files = sorted((place.folder / "run").glob("attempt-*/events.jsonl"), key=lambda file: int(file.parent.name[8:]))
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [event for event in events if event["event"] == "begin"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_run_that_dies_of_a_long_batch_ends_as_if_it_had_not(form: Form, made: Path, tmp_path: Path) -> None:
    if not (form.venv / "bin" / "python").exists():
        pytest.skip("`make test` installs the environment of the oldest transformers")
    whole, broken = a_place(made, tmp_path / "whole"), a_place(made, tmp_path / "broken")
    with undisturbed(form, whole) as reference:
        limit = held_in_first_steps(reference, whole) + form.margin_mib * MIB
        done = supervised(form, broken, limit)
        assert reference.wait(600) == 0
    assert done.returncode == 0, done.stderr[-5000:]
    assert "can't allocate memory" in done.stderr or "could not create a primitive" in done.stderr
    assert "Out of device memory in training step 10" in done.stderr

    attempts = begins(broken)
    assert len(attempts) > 1
    assert [one["micro_batch_size"] * one["gradient_accumulation_steps"] for one in attempts] == [8] * len(attempts)
    assert {one["max_steps"] for one in attempts} == {STEPS}
    assert last_state(broken)["global_step"] == last_state(whole)["global_step"] == STEPS

    expected, found = form.steps(whole), form.steps(broken)
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    for step, wanted in expected.items():
        assert found[step].samples == wanted.samples, step
        assert found[step].learning_rate == pytest.approx(wanted.learning_rate, rel=1e-9), step
        assert found[step].loss == pytest.approx(wanted.loss, rel=1e-3), step
