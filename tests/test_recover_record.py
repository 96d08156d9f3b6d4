"""What a real run measured, as trials, and that the next fit goes by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.frontier import comparable
from autotune.predict.learned import learn
from autotune.recover.facts import Batch, Death, Ended, EndedBy, Phase, Progress
from autotune.recover.record import trials_of_run
from autotune.tuner import is_no_smaller
from autotune.values import GIB, MIB, Device, Judgement, Origin, Recommendation, TrainingConfig, TrialRecord, Verdict
from gpu_db.store import open_store
from tests.fakes import FakePredictor, Law, a_cpu, a_gpu, a_model, an_environment
from tests.test_tuner import Scene, limited
from tests.test_tuner_seek import a_scene

LAW = Law()
OOM = Judgement(verdict=Verdict.DEVICE_OOM, evidence=("CUDA out of memory",))
CONFIG = TrainingConfig(sequence_length=2048, micro_batch_size=4, gradient_accumulation_steps=4)
PROGRESS = Progress(
    phase=Phase.TRAIN,
    first_step=0,
    step=137,
    steps=137,
    step_time_s=9.0,
    micro_batch_times_s=(2.0, 2.1, 2.2),
    loss=1.5,
    peak_allocated_bytes=8 * GIB,
    peak_reserved_bytes=9 * GIB,
    longest_seen=Batch(samples=4, tokens=900),
)
DEATH = Death(
    exception="torch.OutOfMemoryError",
    message="CUDA out of memory.",
    traceback="a line of the user's script",
    phase=Phase.TRAIN,
    batch=Batch(samples=4, tokens=1870),
    step=137,
)
ENDED = Ended(exit_code=1, progress=PROGRESS, death=DEATH, tail="a sample of the data", pid=77)


def trials(ended: Ended = ENDED, judgement: Judgement = OOM, **changes: Any) -> tuple[TrialRecord, ...]:
    asked: dict[str, Any] = {
        "config": CONFIG,
        "source": a_model(),
        "device": a_gpu(),
        "memory_limit_bytes": None,
        "environment": an_environment(),
        "time_utc": "2026-03-04T05:06:07+00:00",
        "run_id": "r1",
    }
    return trials_of_run(ended, judgement, **{**asked, **changes})


def test_a_death_is_two_trials_what_passed_and_what_did_not() -> None:
    passed, died = trials()
    assert (passed.judgement.verdict, died.judgement.verdict) == (Verdict.FITS, Verdict.DEVICE_OOM)
    assert (passed.config.sequence_length, died.config.sequence_length) == (900, 1870)
    assert {passed.origin, died.origin} == {Origin.RUN}
    assert passed.report.peak_allocated_bytes == 8 * GIB
    assert died.report.failure is not None
    assert died.report.failure.phase == "forward"


def test_nothing_of_the_runs_output_or_script_is_kept() -> None:
    for trial in trials():
        assert "of the data" not in repr(trial.report)
        assert "script" not in repr(trial.report)


@pytest.mark.parametrize(
    ("ended", "judgement", "verdicts"),
    [
        (ENDED, replace(OOM, verdict=Verdict.NOT_OOM), [Verdict.FITS]),
        (replace(ENDED, death=None, exit_code=0), replace(OOM, verdict=Verdict.FITS), [Verdict.FITS]),
        (replace(ENDED, death=replace(DEATH, phase=Phase.EVALUATE)), OOM, [Verdict.FITS]),
        (replace(ENDED, progress=replace(PROGRESS, steps=1)), OOM, [Verdict.DEVICE_OOM]),
        (replace(ENDED, progress=replace(PROGRESS, longest_seen=None)), OOM, [Verdict.DEVICE_OOM]),
        (Ended(exit_code=1, ended_by=EndedBy.STALL), replace(OOM, verdict=Verdict.TIMEOUT), []),
    ],
)
def test_only_what_training_showed_is_kept(ended: Ended, judgement: Judgement, verdicts: list[Verdict]) -> None:
    assert [trial.judgement.verdict for trial in trials(ended, judgement)] == verdicts


def test_a_partial_batch_that_passed_stands_for_fewer_tokens_and_one_that_died_for_a_full_one() -> None:
    small = Batch(samples=2, tokens=1000)
    ended = replace(ENDED, progress=replace(PROGRESS, longest_seen=small), death=replace(DEATH, batch=small))
    passed, died = trials(ended)
    assert (passed.config.micro_batch_size, passed.config.sequence_length) == (4, 500)
    assert (died.config.micro_batch_size, died.config.sequence_length) == (4, 1000)


def test_times_count_only_where_batches_are_as_long_as_the_length_recorded() -> None:
    uneven, _ = trials(replace(ENDED, progress=replace(PROGRESS, tokens_per_second=16 * 500 / 9.0)))
    even, _ = trials(replace(ENDED, progress=replace(PROGRESS, tokens_per_second=16 * 900 / 9.0)))
    assert uneven.tokens_per_second is None
    assert uneven.report.phases_s == {"optimizer_step": 9.0}
    assert even.tokens_per_second == pytest.approx(16 * 900 / 9.0)


def test_memory_that_others_took_is_taken_off_what_a_death_says() -> None:
    _, died = trials(replace(ENDED, tenants_bytes=5 * GIB, free_before_bytes=12 * GIB))
    assert died.memory_limit_bytes == 7 * GIB
    _, died = trials(memory_limit_bytes=8 * GIB)
    assert died.memory_limit_bytes == 8 * GIB


def test_on_the_cpu_the_limit_is_less_by_what_is_no_tensor_and_unknown_without_a_prediction() -> None:
    beside = 600 * MIB
    peak = LAW.peak_bytes(replace(CONFIG, sequence_length=900)) + beside
    ended = replace(ENDED, progress=replace(PROGRESS, peak_reserved_bytes=peak))
    predictor = FakePredictor(law=LAW)
    cpu: dict[str, Any] = {"device": a_cpu(), "memory_limit_bytes": 9 * GIB}
    assert {trial.report.limit_bytes for trial in trials(ended, predict=predictor.expect, **cpu)} == {9 * GIB - beside}
    assert {trial.report.limit_bytes for trial in trials(ended, **cpu)} == {None}


def test_it_is_stored_and_read_back(tmp_path: Path) -> None:
    with open_store(tmp_path, a_gpu()) as store:
        kept = [store.append(trial) for trial in trials()]
        assert store.trials() == kept


def test_a_passed_batch_corrects_predictions_and_a_death_is_a_bound() -> None:
    predictor = FakePredictor(law=LAW)
    ended = replace(
        ENDED,
        progress=replace(
            PROGRESS, peak_allocated_bytes=round(1.1 * LAW.peak_bytes(replace(CONFIG, sequence_length=900)))
        ),
    )
    learned = learn(trials(ended, predict=predictor.expect), an_environment(), model_fingerprint=a_model().fingerprint)
    assert learned.memory is not None
    assert learned.memory.median == pytest.approx(1.1, rel=1e-3)
    assert (learned.time, learned.context) == (None, None)


# ---------------------------------------------------------------- the next fit


def dies(scene: Scene, answer: TrainingConfig, tokens: int, *, device: Device | None = None) -> None:
    """A run of the fit's answer ran out of memory at a batch of so many tokens."""
    ended = replace(ENDED, death=replace(DEATH, batch=Batch(samples=answer.micro_batch_size, tokens=tokens)))
    ended = replace(ended, progress=replace(PROGRESS, longest_seen=None))
    found = trials(
        ended,
        config=answer,
        source=scene.request.model,
        device=device or scene.device,
        memory_limit_bytes=scene.request.memory_limit_bytes,
        environment=scene.executor.environment(),
    )
    for trial in found:
        scene.store.append(trial)


def answer_of(result: Recommendation) -> TrainingConfig:
    assert result.proof is not None
    return result.proof.config


@pytest.mark.parametrize("seeing", [True, False])
def test_a_config_that_a_real_run_died_with_is_not_handed_back(seeing: bool) -> None:
    scene = a_scene()
    if not seeing:
        scene.predictor = None
    first = answer_of(scene.fit())
    assert scene.fit().from_database
    dies(scene, first, tokens=200)
    second = scene.fit()
    found = answer_of(second)
    assert not second.from_database
    assert not is_no_smaller(found, replace(first, sequence_length=200))
    assert found.effective_batch_size == first.effective_batch_size
    assert any("real run" in note for note in second.notes)
    third = scene.fit()
    assert third.from_database
    assert answer_of(third) == found


def test_a_run_that_died_with_less_memory_or_a_longer_batch_says_nothing_here() -> None:
    scene = a_scene()
    first = answer_of(scene.fit())
    dies(scene, first, tokens=first.sequence_length + 1)
    smaller = replace(scene, request=limited(500, upcast=scene.request.start.upcast))
    smaller.store = scene.store
    dies(smaller, first, tokens=100)
    again = scene.fit()
    assert again.from_database
    assert answer_of(again) == first


def test_a_run_that_went_well_is_no_proof() -> None:
    scene = a_scene()
    config = replace(scene.request.start, micro_batch_size=8, gradient_accumulation_steps=1)
    fits = Judgement(verdict=Verdict.FITS)
    ended = Ended(exit_code=0, progress=replace(PROGRESS, longest_seen=Batch(samples=8, tokens=256)))
    for trial in trials(
        ended, fits, config=config, source=scene.request.model, environment=scene.executor.environment()
    ):
        scene.store.append(trial)
    result = scene.fit()
    assert not result.from_database
    assert result.proof is not None
    assert result.proof.origin is Origin.PROOF


def test_lengths_measured_by_probes_are_not_shown_where_a_real_run_died() -> None:
    scene = a_scene()
    result = scene.fit()
    first = answer_of(result)
    before = {t.config for t in comparable(result, scene.store.rows) if t.judgement.verdict is Verdict.FITS}
    assert first in before
    dies(scene, first, tokens=100)
    died = [t for t in scene.store.rows if t.origin is Origin.RUN]
    died = [replace(t, report=replace(t.report, limit_bytes=10**12)) for t in died]
    left = {t.config for t in comparable(result, [*scene.store.rows, *died]) if t.judgement.verdict is Verdict.FITS}
    assert first not in left
