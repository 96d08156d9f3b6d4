"""A sweep's flow with fakes for its seams: every config a stored trial and a row, those that do not fit too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from autotune.errors import Interrupted, ProbeFailed
from autotune.grid import parse_grid, plan_of_grid
from autotune.landscape import Row
from autotune.sweep import IN_A_ROW, Failed, Sweep
from autotune.tuner import Seams, request_id
from autotune.values import MIB, Failure, FitRequest, ProbeRequest, TrainingConfig, Verdict
from tests.fakes import FakeExecutor, FakePredictor, Law, MemoryStore, a_cpu, a_request
from tests.test_tuner import PureJudge, Watcher

REQUEST = a_request(memory_limit_bytes=900 * MIB)
GRID = parse_grid(["micro_batch_size=1,2,4,8", "gradient_checkpointing=off,full"], "--set")
CONFIGS = plan_of_grid(GRID, REQUEST, a_cpu(), ()).configs


class Scene:
    def __init__(self, request: FitRequest = REQUEST, **executor: Any) -> None:
        self.request, self.executor, self.store = request, FakeExecutor(**executor), MemoryStore()
        self.watcher = Watcher(self.store)
        self.predictor = FakePredictor(Law(), 900 * MIB)
        self.rows: list[Row] = []
        self.sweep = Sweep(request, a_cpu(), self.seams(), headroom_bytes=0, micro_batches=3)

    def seams(self) -> Seams:
        return Seams(
            executor=self.executor,
            store=self.store,
            judge=PureJudge(),
            observer=self.watcher,
            now_utc=lambda: "2026-01-01T00:00:00+00:00",
            monotonic=lambda: 0.0,
            predictor=self.predictor,
        )

    def run(self, configs: Sequence[TrainingConfig] = CONFIGS) -> list[Failed]:
        return list(self.sweep.run(configs, self.rows.append))


def dies_of(*batches: int) -> Any:
    """A bug at these micro batch sizes."""

    def failure(request: ProbeRequest) -> Failure | None:
        if request.config.micro_batch_size not in batches:
            return None
        return Failure(phase="forward", exception="builtins.TypeError", message="no such kernel")

    return failure


def test_every_config_is_measured_in_turn_whatever_is_predicted() -> None:
    scene = Scene()
    assert scene.run() == []
    assert [row.config for row in scene.rows] == list(CONFIGS)
    assert {row.verdict for row in scene.rows} == {Verdict.FITS, Verdict.DEVICE_OOM}
    law = scene.executor.law
    assert [row.verdict is Verdict.FITS for row in scene.rows] == [law.peak_bytes(c) <= 900 * MIB for c in CONFIGS]


def test_a_row_that_fits_says_what_it_needed_and_took_and_another_what_it_asked_for() -> None:
    scene = Scene()
    scene.run()
    law = scene.executor.law
    for row in scene.rows:
        fits = row.verdict is Verdict.FITS
        assert row.needed_bytes == (round(law.peak_bytes(row.config) * 1.02) if fits else None)
        assert bool(row.micro_batch_times_s) == bool(row.optimizer_times_s) == fits
        assert (row.tried_bytes is None) == fits
        assert row.startup_s == pytest.approx(0.3)


def test_a_row_has_what_was_predicted_with_nothing_learned() -> None:
    scene = Scene()
    scene.predictor.memory_error = 2.0  # a fit would learn to halve it
    scene.run()
    expected = [row.predicted.peak_allocated_bytes for row in scene.rows if row.predicted]
    assert expected == [2 * scene.executor.law.peak_bytes(config) for config in CONFIGS]
    assert all(row.predicted and row.predicted.seconds_by_kind for row in scene.rows)


def test_every_trial_is_stored_as_a_fit_would_before_it_is_shown() -> None:
    scene = Scene()
    scene.run()
    assert scene.watcher.rows_seen == list(range(1, len(CONFIGS) + 1))
    assert {trial.request_id for trial in scene.store.rows} == {request_id(REQUEST, 0)}
    assert all(trial.prediction for trial in scene.store.rows)


def test_no_more_micro_batches_are_timed_than_asked() -> None:
    scene = Scene(noise=0.5)
    scene.run()
    assert {request.micro_batches for request in scene.executor.requests} == {3}


def test_what_fails_and_not_for_memory_is_no_row_and_the_sweep_goes_on() -> None:
    scene = Scene(failure=dies_of(2))
    failed = scene.run()
    assert [one.config.micro_batch_size for one in failed] == [2, 2]
    assert "no such kernel" in failed[0].reason
    assert [row.config.micro_batch_size for row in scene.rows] == [1, 4, 8, 1, 4, 8]


def test_failures_one_after_the_other_end_a_sweep() -> None:
    scene = Scene(failure=dies_of(1, 2, 4))
    with pytest.raises(ProbeFailed, match="no such kernel"):
        scene.run()
    assert scene.executor.probes == IN_A_ROW


def test_a_first_config_that_dies_ends_a_sweep_at_once() -> None:
    scene = Scene(failure=dies_of(1))
    with pytest.raises(ProbeFailed, match="no such kernel"):
        scene.sweep.start_worker(CONFIGS[0])


def test_starting_a_worker_says_how_long_it_took_even_out_of_memory() -> None:
    scene = Scene(request=replace(REQUEST, memory_limit_bytes=10 * MIB))
    assert scene.sweep.start_worker(CONFIGS[0]) == pytest.approx(0.3)


def test_an_interrupted_sweep_keeps_its_rows() -> None:
    scene = Scene(interrupt_after=3)
    with pytest.raises(Interrupted):
        scene.run()
    assert [row.config for row in scene.rows] == list(CONFIGS[:3])
