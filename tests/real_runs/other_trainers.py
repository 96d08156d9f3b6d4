"""axolotl and LLaMA-Factory, each in its own environment, recovered once each: `make test-trainers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.values import MIB
from tests.real_runs.forms import REPOSITORY, axolotl_command, last_state, llamafactory_command, logged_steps
from tests.real_runs.story import Form, a_place, begins, held_in_first_steps, make, supervised, undisturbed

pytestmark = pytest.mark.timeout(1800)

FORMS = [
    Form("axolotl", REPOSITORY / ".venv-axolotl", axolotl_command, logged_steps, 480),
    Form("llamafactory", REPOSITORY / ".venv-llamafactory", llamafactory_command, logged_steps, 480),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_it_dies_of_a_long_batch_is_recovered_and_finishes(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(an_empty_torchaudio(tmp_path)))
    made = make(tmp_path)
    whole, broken = a_place(made, tmp_path / "whole"), a_place(made, tmp_path / "broken")
    with undisturbed(form, whole) as reference:
        limit = held_in_first_steps(reference, whole) + form.margin_mib * MIB
        done = supervised(form, broken, limit)
        assert reference.wait(600) == 0
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Out of device memory in training step" in done.stderr

    attempts = begins(broken)
    assert len(attempts) > 1
    assert [one["micro_batch_size"] * one["gradient_accumulation_steps"] for one in attempts] == [8] * len(attempts)
    assert last_state(broken)["global_step"] == last_state(whole)["global_step"]

    expected, found = form.steps(whole), form.steps(broken)
    assert sorted(found) == sorted(expected)
    for step, wanted in expected.items():
        assert found[step].learning_rate == pytest.approx(wanted.learning_rate, rel=1e-9), step
        assert found[step].loss == pytest.approx(wanted.loss, rel=1e-3), step


def an_empty_torchaudio(folder: Path) -> Path:
    """LLaMA-Factory imports it, and the one that a registry has is built for CUDA."""
    package = folder / "stub" / "torchaudio"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return package.parent
