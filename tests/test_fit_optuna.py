"""`fit --optuna`: a fit's trials as a study that Optuna's own calls load, and paths that are refused before probing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from autotune.cli.fit_files import check_files, write_files
from autotune.errors import AutotuneError
from autotune.search.export_study import trials_of_fit
from autotune.values import Origin, Recommendation, Verdict
from tests.test_cli_fit_bad_input import Terminal
from tests.test_cli_fit_bad_input import terminal as terminal
from tests.test_tuner import Scene, limited


def write(result: Recommendation, path: Path) -> optuna.Study:
    """The study in `path`, read back by Optuna."""
    write_files(result, {"output": None, "plot": None, "study_file": path, "force": False})
    return optuna.load_study(study_name=path.stem, storage=f"sqlite:///{path}")


def test_optuna_loads_a_fits_trials_with_values_and_constraints(tmp_path: Path) -> None:
    result = Scene(request=limited(900)).fit()
    study = write(result, tmp_path / "a fit.db")
    assert len(study.trials) == len(result.trials) > 3
    assert result.out_of_memory > 0
    for trial, kept in zip(study.trials, result.trials, strict=True):
        fits = kept.judgement.verdict is Verdict.FITS
        assert trial.params["micro_batch_size"] == kept.config.micro_batch_size
        assert (trial.state is optuna.trial.TrialState.FAIL) == (not fits)
        assert trial.value == kept.tokens_per_second
        assert (trial.system_attrs["constraints"][0] > 0) == (not fits)
        assert trial.user_attrs["verdict"] == kept.judgement.verdict.value
        assert trial.user_attrs["origin"] == kept.origin.value
    proof = result.proof
    assert proof is not None
    assert study.trials[-1].user_attrs["origin"] == Origin.PROOF.value
    assert study.trials[-1].value == proof.tokens_per_second


def test_an_answer_from_the_database_gives_the_same_study(tmp_path: Path) -> None:
    scene = Scene()
    first = write(scene.fit(), tmp_path / "first.db")
    known = scene.fit()
    assert known.from_database
    second = write(known, tmp_path / "second.db")
    facts = [[(t.state, t.params, t.value, t.user_attrs) for t in study.trials] for study in (first, second)]
    assert facts[0] == facts[1]


def test_a_probe_that_was_cut_short_is_pruned() -> None:
    result = Scene().fit()
    fitting = next(trial for trial in result.trials if trial.tokens_per_second)
    cut = replace(fitting, report=replace(fitting.report, cut_short=True))
    (trial,) = trials_of_fit(replace(result, trials=(cut,)))
    assert trial.state is optuna.trial.TrialState.PRUNED
    assert trial.intermediate_values == {0: cut.tokens_per_second}


def test_a_study_of_a_fit_without_trials_is_empty(tmp_path: Path) -> None:
    result = replace(Scene().fit(), trials=())
    assert write(result, tmp_path / "none.db").trials == []


def asked(path: Path, **options: Any) -> dict[str, Any]:
    return {"output": None, "plot": None, "study_file": path, "force": False, **options}


def test_a_study_is_overwritten_only_by_force_and_other_files_never(tmp_path: Path) -> None:
    study, notes = tmp_path / "study.db", tmp_path / "notes.txt"
    result = Scene().fit()
    write(result, study)
    notes.write_text("kept")
    with pytest.raises(AutotuneError, match=r"study\.db exists: give --force to overwrite it, or another --optuna"):
        check_files(asked(study))
    check_files(asked(study, force=True))
    assert len(write(result, study).trials) == len(result.trials)
    with pytest.raises(AutotuneError, match="no storage of Optuna"):
        check_files(asked(notes, force=True))
    with pytest.raises(AutotuneError, match="--optuna and --output are both"):
        check_files(asked(study, output=study, force=True))


@pytest.mark.parametrize(
    ("path", "said"),
    [("no/study.db", "no is no folder"), (".", "is a folder"), ("there.yaml", "no storage of Optuna")],
)
def test_a_path_that_cannot_be_written_is_told_before_anything_runs(terminal: Terminal, path: str, said: str) -> None:
    model = str(terminal.folder / "tiny.json")
    ended = terminal.run("fit", "--gpu", "cpu", "--model", model, "--optuna", path)
    assert ended.code == 1
    assert said in ended.error
    assert not list(terminal.home.glob("gpus/*"))
