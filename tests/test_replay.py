"""The real search and other tools' on a made-up landscape, answered from its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.values import FitStatus, ProbeRequest, TrainingConfig, Verdict
from benchmarks.replay import (
    NotInLandscape,
    Recorded,
    RecordedJudge,
    RecordedPredictor,
    ReplayExecutor,
    replay_fit,
    seconds_of,
    settings_of,
)
from benchmarks.searchers import OURS, TOOLS, TRIALS, closest_settings, search
from tests.fakes import a_cpu
from tests.made_landscape import FRESH_START_S, OPTIMIZER_S, START, STARTUP_S, a_landscape


def a_config(micro_batch: int = 1, **changes: str) -> TrainingConfig:
    return replace(START, micro_batch_size=micro_batch, gradient_accumulation_steps=16 // micro_batch, **changes)


def a_probe(config: TrainingConfig, **changes: object) -> ProbeRequest:
    recorded = Recorded(a_landscape())
    request = ProbeRequest(
        model=recorded.header.model, config=config, device="cuda:0", memory_limit_bytes=recorded.allowed_bytes
    )
    return replace(request, **changes)  # type: ignore[arg-type]


def with_times(times: tuple[float, ...]) -> Recorded:
    """The landscape with these timed micro batches of one sample."""
    landscape = a_landscape()
    rows = [replace(r, micro_batch_times_s=times) if r.config == a_config() else r for r in landscape.rows]
    return Recorded(replace(landscape, rows=tuple(rows)))


# Probes


def test_the_first_warm_probe_starts_the_worker_and_the_next_does_not() -> None:
    executor = ReplayExecutor(Recorded(a_landscape()))
    first, second = executor.probe(a_probe(a_config())), executor.probe(a_probe(a_config(2)))
    assert (first.startup_s, second.startup_s) == (FRESH_START_S, STARTUP_S)
    assert executor.clock_s == pytest.approx(first.wall_time_s + second.wall_time_s)


def test_recorded_seconds_may_lead_past_the_end_of_the_calendar() -> None:
    executor = ReplayExecutor(with_times((9e8,) * 8))
    for _ in range(150):
        executor.probe(a_probe(a_config(), proof=True))
    assert executor.clock_s > 3e11
    assert executor.now_utc() < "9999"


def test_a_probe_takes_its_start_a_warm_up_the_timed_micro_batches_and_the_optimizer() -> None:
    executor = ReplayExecutor(with_times((2.0, 2.04, 1.96, 2.2, 2.0, 2.0, 2.0, 2.0)))
    report = executor.probe(a_probe(a_config()))
    assert report.micro_batch_times_s == (2.0, 2.04, 1.96, 2.2)  # more than eight seconds say enough
    assert report.wall_time_s == pytest.approx(FRESH_START_S + 2.0 + 8.2 + OPTIMIZER_S)


def test_a_proof_is_a_fresh_process_with_three_steps_of_samples_that_no_probe_saw() -> None:
    executor = ReplayExecutor(with_times((1.0,) * 6 + (2.0, 2.0)))
    executor.probe(a_probe(a_config()))
    proof = executor.probe(a_probe(a_config(), proof=True, optimizer_steps=3), fresh=True)
    assert proof.micro_batch_times_s == (2.0,) * 4  # two a step; the first step is warm-up
    assert proof.startup_s == FRESH_START_S
    assert proof.wall_time_s == pytest.approx(FRESH_START_S + 6 * 2.0 + 3 * OPTIMIZER_S + 2.0 / 3)


def test_a_probe_that_cannot_win_any_more_is_cut_short_and_costs_less() -> None:
    times = (1.0, 1.1, 1.0, 1.1, 1.0, 1.1)
    whole = ReplayExecutor(with_times(times)).probe(a_probe(a_config()))
    cut = ReplayExecutor(with_times(times)).probe(a_probe(a_config(), beat_s=0.5))
    assert not whole.cut_short
    assert cut.cut_short
    assert cut.wall_time_s < whole.wall_time_s


def test_a_probe_that_may_still_win_is_not_cut_short() -> None:
    report = ReplayExecutor(with_times((1.0, 1.1, 1.0, 1.1))).probe(a_probe(a_config(), beat_s=1.0))
    assert not report.cut_short


def test_out_of_memory_has_the_rows_verdict_and_what_was_asked_for() -> None:
    recorded = Recorded(a_landscape())
    executor, request = ReplayExecutor(recorded), a_probe(a_config(16))
    report = executor.probe(request)
    judgement = RecordedJudge(recorded).judge(report, request)
    assert judgement.verdict is Verdict.DEVICE_OOM
    assert judgement.numbers["tried_bytes"] == recorded.row(a_config(16)).tried_bytes
    assert report.micro_batch_times_s == ()
    assert executor.out_of_memory == 1


def test_a_config_without_a_row_is_named() -> None:
    with pytest.raises(NotInLandscape, match=r"'made up' has no row of .*gradient_checkpointing every_8"):
        ReplayExecutor(Recorded(a_landscape())).probe(a_probe(a_config(gradient_checkpointing="every_8")))


def test_a_config_without_a_row_has_no_prediction() -> None:
    predictor = RecordedPredictor(Recorded(a_landscape()))
    lacking, known = a_config(gradient_checkpointing="every_8"), a_config()
    assert predictor.expect(lacking) is None
    assert predictor.seconds(lacking) is None
    assert not predictor.at_hand(lacking)
    assert predictor.at_hand(known)
    assert sum((predictor.seconds(known) or {}).values()) == pytest.approx(seconds_of(predictor.recorded.row(known)))


def test_what_is_far_above_the_memory_allowed_is_hopeless_and_what_fits_is_not() -> None:
    predictor = RecordedPredictor(Recorded(a_landscape()))
    assert predictor.hopeless(a_config(16))
    assert not predictor.hopeless(a_config(1))


# Our search


@pytest.mark.parametrize("allowed_mib", [700, 1000, 1700, 4000])
def test_the_programs_own_fit_returns_a_config_that_fits(allowed_mib: int) -> None:
    recorded = Recorded(a_landscape(allowed_mib))
    found, executor = replay_fit(recorded)
    assert found.status is FitStatus.FITTED
    assert found.proof is not None
    assert recorded.row(found.proof.config).verdict is Verdict.FITS
    assert recorded.regret(seconds_of(recorded.row(found.proof.config))) == pytest.approx(0.0, abs=0.05)
    assert executor.probes == found.probes
    assert found.wall_time_s == pytest.approx(executor.clock_s)


def test_the_fit_says_so_where_nothing_fits() -> None:
    recorded = Recorded(a_landscape(300))
    found, _ = replay_fit(recorded)
    assert found.status is FitStatus.NOTHING_FITS
    result = search(OURS, recorded, 0)
    assert (result.anything_fits, result.returned) == (False, None)


def test_a_fit_on_a_processor_sees_what_is_held_against_its_limit() -> None:
    recorded = Recorded(a_landscape(device=a_cpu(16)))
    report = ReplayExecutor(recorded).probe(a_probe(a_config()))
    assert report.peak_reserved_bytes == recorded.row(a_config()).needed_bytes


# What is recorded


def test_rows_that_are_no_answer_to_the_request_are_left_out() -> None:
    landscape = a_landscape()
    best = Recorded(landscape).best
    assert best is not None
    quicker = {"micro_batch_times_s": (1e-6,), "true_step_time_s": 1e-6}
    eight_bit = replace(best, config=replace(best.config, optimizer="adamw_bnb_8bit"), **quicker)
    halved = replace(best, config=replace(best.config, gradient_accumulation_steps=1, micro_batch_size=8), **quicker)
    lower_rank = replace(best, config=replace(best.config, lora_rank=4), **quicker)
    with_them = Recorded(replace(landscape, rows=(*landscape.rows, eight_bit, halved, lower_rank)))
    assert with_them.best == best


def test_a_batch_between_two_rows_lies_on_their_line() -> None:
    recorded = Recorded(a_landscape(4000))
    settings = settings_of(a_config())
    two, three, four = (recorded.spot(settings, batch) for batch in (2, 3, 4))
    assert three.micro_s == pytest.approx((two.micro_s + four.micro_s) / 2)
    assert three.memory == pytest.approx((two.memory + four.memory) / 2)
    assert three.fits


def test_a_batch_beyond_the_first_that_ran_out_of_memory_runs_out_of_memory() -> None:
    recorded = Recorded(a_landscape())
    settings = settings_of(a_config())
    fits = {batch: recorded.spot(settings, batch).fits for batch in range(1, 20)}
    assert fits[2]
    assert not fits[4]  # recorded
    assert [batch for batch, fit in fits.items() if fit] == [1, 2, 3]  # 3: by the line of memory


def test_regret_is_zero_within_the_best_rows_samples_only_where_the_truth_is_not_known() -> None:
    simulated = Recorded(a_landscape(noise=0.02))
    landscape = a_landscape(noise=0.02)
    measured = Recorded(replace(landscape, rows=tuple(replace(r, true_step_time_s=None) for r in landscape.rows)))
    assert simulated.best is not None
    assert measured.best is not None
    assert simulated.regret(seconds_of(simulated.best) * 1.03) == pytest.approx(0.03)
    assert measured.regret(seconds_of(measured.best) * 1.03) == 0.0
    assert measured.regret(seconds_of(measured.best) * 1.10) == pytest.approx(0.10)


# Other tools


def test_tools_get_the_settings_nearest_to_their_defaults_and_the_difference_is_told() -> None:
    assert closest_settings(Recorded(a_landscape(start=replace(START, upcast="fp32")))) == (
        settings_of(replace(START, upcast="fp32")),
        (),
    )
    settings, differs = closest_settings(Recorded(a_landscape()))
    assert settings == settings_of(START)
    assert differs == ("upcast",)


def test_a_tool_within_one_process_pays_one_start_and_a_tool_of_processes_one_a_run() -> None:
    recorded = Recorded(a_landscape())
    one, many = search("lightning-power", recorded, 0), search("deepspeed", recorded, 0)
    assert FRESH_START_S < one.seconds < 2 * FRESH_START_S
    assert many.seconds > many.probes * FRESH_START_S


def test_a_batch_that_does_not_divide_the_effective_one_is_compared_by_time_a_sample() -> None:
    recorded = Recorded(a_landscape())
    result = search("accelerate", recorded, 0)
    assert result.returned is not None
    assert (result.returned.micro_batch_size, result.returned.gradient_accumulation_steps) == (3, 6)
    spot = recorded.spot(settings_of(a_config()), 3)
    a_sample = (6 * spot.true_micro_s + spot.optimizer_s) / 18
    assert result.regret == pytest.approx(a_sample * 16 / seconds_of(recorded.best) - 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_ends_and_says_what_it_ran(name: str) -> None:
    result = search(name, Recorded(a_landscape()), 0)
    assert result.probes >= result.out_of_memory
    assert result.seconds >= FRESH_START_S
    assert (result.regret is not None) == result.runs


@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_returns_what_runs_where_nothing_does(name: str) -> None:
    assert not search(name, Recorded(a_landscape(300)), 0).runs


# Samplers


def test_exhaustive_probes_every_row_and_finds_the_best() -> None:
    recorded = Recorded(a_landscape(noise=0.0))
    result = search("exhaustive", recorded, 0)
    assert result.probes == len(recorded.rows)
    assert result.regret == 0.0


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_sampler_runs_as_many_different_configs_as_it_may_and_the_same_for_a_seed(name: str) -> None:
    recorded = Recorded(a_landscape())
    found = [search(name, recorded, seed) for seed in (0, 0, 1)]
    assert [result.probes for result in found] == [TRIALS] * 3
    assert found[0] == found[1]
    assert found[0] != replace(found[2], seed=0)


def test_a_cold_sampler_finds_the_same_and_pays_a_start_for_each_config() -> None:
    recorded = Recorded(a_landscape())
    warm, cold = search("random", recorded, 0), search("random", recorded, 0, cold=True)
    assert cold.returned == warm.returned
    assert cold.seconds == pytest.approx(warm.seconds + (TRIALS - 1) * (FRESH_START_S - STARTUP_S))


def test_the_gaussian_process_learns_what_fits() -> None:
    pytest.importorskip("scipy", reason="Optuna's GP needs it")
    small = replace(a_landscape(), rows=a_landscape().rows[::4])
    result = search("gp", Recorded(small), 0)
    assert result.runs
    assert 0 < result.probes <= TRIALS
