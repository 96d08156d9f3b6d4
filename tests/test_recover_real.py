"""Real trainers that die of real out-of-memory under `autotune run` end as if they had not, old and new ones."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

from autotune.values import MIB
from tests.real_runs.forms import (
    MICRO_BATCH,
    REPOSITORY,
    last_state,
    logged_steps,
    torchrun_command,
    trainer_command,
    trainer_steps,
    trl_command,
)
from tests.real_runs.make_data import SAMPLES
from tests.real_runs.story import Form, a_place, begins, events, held_in_first_steps, make, supervised, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = SAMPLES // MICRO_BATCH

# Margins: what was held more than in the first steps when the long batch passed, one thread, torch 2.13.0 CPU build
TRAINER, TRL = (trainer_command, trainer_steps), (trl_command, logged_steps)
NEWEST, OLDEST = Path(sys.prefix), REPOSITORY / ".venv-457"
FORMS = [
    Form("trainer-newest", NEWEST, *TRAINER, 480),
    Form("trl-newest", NEWEST, *TRL, 1300),
    Form("trainer-4.57", OLDEST, *TRAINER, 480),
    Form("trl-4.57", OLDEST, *TRL, 480),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("real"))


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


def test_a_rank_that_runs_out_of_memory_ends_the_others_within_seconds(made: Path, tmp_path: Path) -> None:
    form = Form("torchrun", NEWEST, torchrun_command, trainer_steps, 160)
    whole, broken = a_place(made, tmp_path / "whole"), a_place(made, tmp_path / "broken")
    with undisturbed(form, whole) as reference:
        limit = held_in_first_steps(reference, whole) + form.margin_mib * MIB
    done = supervised(form, broken, limit)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Out of device memory in training step 10" in done.stderr
    first, *_ = json.loads((broken.folder / "run" / "run.json").read_text())["incidents"]
    deaths = [event for event in events(broken) if event["event"] == "died" and event["step"] == 9]
    decided = datetime.fromisoformat(first["time_utc"]).timestamp()  # after predictions of some seconds
    assert max(death["time"] for death in deaths) - deaths[0]["time"] < 10
    assert decided - deaths[0]["time"] < 120  # gloo's own limit is half an hour
    assert {one["world_size"] for one in begins(broken)} == {2}
    assert last_state(broken)["global_step"] == STEPS
    logs = sorted((broken.folder / "run" / "attempt-1" / "ranks").rglob("stderr.log"))
    assert [log.parent.name for log in logs] == ["0", "1"]
    assert any("can't allocate memory" in log.read_text() for log in logs)
