"""A landscape as a study that Optuna's own calls load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from autotune.errors import InvalidRequest
from autotune.landscape import Landscape
from autotune.search.export_study import check_storage, speed_of, trials_of, write_study
from autotune.values import MIB, Verdict
from tests.made_landscape import a_landscape


@pytest.fixture(scope="module")
def landscape() -> Landscape:
    whole = a_landscape(900)
    return replace(whole, rows=whole.rows[::12])  # Optuna takes its time to store a trial


def load(path: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{path}")


def test_optuna_loads_every_row_with_its_value_and_constraint(tmp_path: Path, landscape: Landscape) -> None:
    path = tmp_path / "study.db"
    write_study(path, "made up", trials_of(landscape))
    study = load(path, "made up")
    assert len(study.trials) == len(landscape.rows)
    fits = [row for row in landscape.rows if row.verdict is Verdict.FITS]
    assert study.best_value == pytest.approx(max(speed_of(row) or 0 for row in fits))
    for trial, row in zip(study.trials, landscape.rows, strict=True):
        assert trial.params["micro_batch_size"] == row.config.micro_batch_size
        assert trial.params["gradient_checkpointing"] == row.config.gradient_checkpointing
        assert (trial.state is optuna.trial.TrialState.COMPLETE) == (row.verdict is Verdict.FITS)
        assert (trial.system_attrs["constraints"][0] > 0) == (row.verdict is not Verdict.FITS)
        assert trial.user_attrs["verdict"] == row.verdict.value
    assert "lora_rank" not in study.trials[0].params  # it does not vary


def test_a_sampler_goes_on_from_it(tmp_path: Path, landscape: Landscape) -> None:
    path = tmp_path / "study.db"
    write_study(path, "made up", trials_of(landscape))
    study = load(path, "made up")
    study.sampler = optuna.samplers.TPESampler(seed=0)
    trial = study.ask(study.trials[0].distributions)
    assert set(trial.params) == set(study.trials[0].params)


def test_a_study_in_memory_is_written_as_it_is(tmp_path: Path) -> None:
    sampler = optuna.samplers.TPESampler(seed=0, constraints_func=lambda trial: (trial.user_attrs["over"],))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for number, state in enumerate([optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]):
        trial = study.ask({"micro_batch_size": optuna.distributions.IntDistribution(1, 8)})
        trial.set_user_attr("over", float(number))
        trial.report(10.0, step=0)
        study.tell(trial, 10.0 if state is optuna.trial.TrialState.COMPLETE else None, state=state)
    write_study(tmp_path / "study.db", "a fit", study.trials)
    loaded = load(tmp_path / "study.db", "a fit").trials
    assert [(t.state, t.params, t.user_attrs) for t in loaded] == [
        (t.state, t.params, t.user_attrs) for t in study.trials
    ]
    assert [list(t.system_attrs["constraints"]) for t in loaded] == [[0.0], [1.0]]


def test_a_study_of_that_name_is_replaced_and_others_stay(tmp_path: Path, landscape: Landscape) -> None:
    path = tmp_path / "study.db"
    few = replace(landscape, rows=landscape.rows[:3])
    write_study(path, "one", trials_of(landscape))
    write_study(path, "two", trials_of(few))
    write_study(path, "one", trials_of(few))
    assert [len(load(path, name).trials) for name in ("one", "two")] == [3, 3]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("kept")
    with pytest.raises(InvalidRequest, match="no storage of Optuna"):
        check_storage(path)
    with pytest.raises(InvalidRequest, match="no storage of Optuna"):
        write_study(path, "one", [])
    assert path.read_text() == "kept"
    with pytest.raises(InvalidRequest, match="no folder"):
        check_storage(tmp_path / "none" / "study.db")


def test_what_fits_by_little_is_feasible(landscape: Landscape) -> None:
    header = replace(landscape.header, memory_limit_bytes=100 * MIB)  # less than any row needs: noise of a driver
    trials = trials_of(replace(landscape, header=header))
    fitting = [t for t in trials if t.state is optuna.trial.TrialState.COMPLETE]
    assert fitting
    assert all(trial.system_attrs["constraints"] == [0.0] for trial in fitting)
