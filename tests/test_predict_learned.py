"""What trials teach of a card, and what a forecast makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import autotune
from autotune.cli import estimate_question
from autotune.cli.learned_here import is_of_card, learned_here, learned_line
from autotune.hardware.cards import find_card
from autotune.predict.forecast import Forecast, Target, cpu_target, forecast, target_of_card
from autotune.predict.kernels import KernelSet
from autotune.predict.learned import CONTEXT_MARGIN_BYTES, Spread, learn, with_learned
from autotune.predict.steptime import INTERVAL
from autotune.predict.store import library_versions
from autotune.predict.trace import Trace, WorkSum
from autotune.probe.dry_run import DryRunner
from autotune.probe.predictor import FitPredictor
from autotune.values import (
    GIB,
    MIB,
    Judgement,
    LengthMix,
    ModelSource,
    Origin,
    Prediction,
    Tenant,
    TrainingConfig,
    TrialRecord,
    Verdict,
    from_json,
    to_json,
)
from autotune.verdict.numbers import read_numbers
from gpu_db.store import open_store
from tests.fakes import a_model, an_environment
from tests.test_predict_plot import CONFIG, a_trace
from tests.test_predict_steptime import optimizer_work, work
from tests.trial_records import DEVICE, report, trial

CARD = find_card("RTX 3060 12GB").card
GPU = an_environment(driver="580.65.06", threads=None)
LIBRARIES_HERE: dict[str, Any] = library_versions()
INSTALLED = replace(GPU, **LIBRARIES_HERE, autotune=autotune.__version__)


def predicted(**changes: Any) -> Prediction:
    """9 GiB and 1 s, uncorrected; the evaluation takes less."""
    fields = {"peak_allocated_bytes": 9 * GIB, "step_time_s": 1.0, "memory_factor": 1.0, "time_factor": 1.0, **changes}
    return Prediction(**{"training_peak_allocated_bytes": fields["peak_allocated_bytes"], **fields})


def measured(memory: float = 1.0, time: float = 1.0, context: int = 500 * MIB, **changes: Any) -> TrialRecord:
    """A trial that took so many times what was predicted."""
    seen = report(
        peak_allocated_bytes=round(9 * GIB * memory),
        micro_batch_times_s=(time,),
        optimizer_times_s=(0.0,),
        device_used_bytes=10 * GIB + context,
    )
    return trial(**{"report": seen, "prediction": predicted(), "environment": GPU, **changes})


def died(text: str, **changes: Any) -> TrialRecord:
    """A trial that ran out of memory with this text."""
    judgement = Judgement(verdict=Verdict.DEVICE_OOM, numbers=read_numbers(text))
    seen = report(peak_allocated_bytes=changes.pop("peak", None), micro_batch_times_s=(), optimizer_times_s=())
    return trial(**{"report": seen, "judgement": judgement, "prediction": predicted(), "environment": GPU, **changes})


def medians(*trials: TrialRecord, **changes: Any) -> tuple[float | None, float | None, float | None]:
    found = learn(trials, **changes)
    context, memory, time = (part.median if part else None for part in (found.context, found.memory, found.time))
    return context, memory, time


def test_a_card_is_known_by_the_middle_of_its_trials() -> None:
    found = learn([measured(1.02, 0.8, 480 * MIB), measured(1.0, 0.9, 500 * MIB), measured(1.01, 1.5, 700 * MIB)])
    assert found.trials == 3
    assert found.context == Spread(count=3, median=500 * MIB, low=480 * MIB, high=700 * MIB)
    assert found.memory == Spread(count=3, median=pytest.approx(1.01), low=1.0, high=pytest.approx(1.02))
    assert found.time == Spread(count=3, median=0.9, low=0.8, high=1.5)


def test_nothing_stored_teaches_nothing() -> None:
    assert with_learned(target_of_card(CARD), learn([])) == target_of_card(CARD)


def test_a_correction_that_a_prediction_had_is_taken_out_again() -> None:
    corrected = predicted(
        peak_allocated_bytes=round(9 * GIB * 1.1), step_time_s=2.0, memory_factor=1.1, time_factor=2.0
    )
    _, memory, time = medians(measured(1.1, 2.0, prediction=corrected))
    assert (memory, time) == (pytest.approx(1.1), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("origin", "training", "ratio"),
    [
        (Origin.PROOF, 6 * GIB, 1.0),
        (Origin.PROOF, None, 1.0),
        (Origin.PROBE, round(8.8 * GIB), pytest.approx(9 / 8.8)),
        (Origin.PROBE, None, None),  # a row of before it was kept
    ],
)
def test_a_probe_is_held_against_training_and_a_proof_against_the_whole(
    origin: Origin, training: int | None, ratio: Any
) -> None:
    prediction = predicted(training_peak_allocated_bytes=training)
    assert medians(measured(1.0, prediction=prediction, origin=origin))[1] == ratio


def test_a_prediction_says_what_training_alone_takes() -> None:
    found = forecast_of(target_of_card(CARD))
    both = replace(found.memory, training_peak_allocated_bytes=5, peak_allocated_bytes=7)
    prediction = replace(found, memory=both).prediction()
    assert (prediction.training_peak_allocated_bytes, prediction.peak_allocated_bytes) == (5, 7)


def test_a_row_of_before_corrections_were_kept_teaches_no_ratio() -> None:
    old = {name: value for name, value in to_json(predicted()).items() if not name.endswith("factor")}
    context, *ratios = medians(measured(prediction=from_json(Prediction, old)))
    assert ratios == [None, None]
    assert context == 500 * MIB


@pytest.mark.parametrize("odd", [measured(memory=1.3), measured(memory=0.7), measured(context=5 * GIB)], ids=str)
def test_what_no_wrong_prediction_explains_is_left_out(odd: TrialRecord) -> None:
    assert medians(odd, measured()) == (500 * MIB, 1.0, 1.0)


def test_trials_of_others_and_negative_contexts_are_left_out() -> None:
    assert medians(measured(context=-GIB), measured(2.0, origin=Origin.DATABASE)) == (None, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"driver": "570.1"}, (None, 1.0, 1.0)),
        ({"torch": "2.9.0"}, (None, None, 1.0)),
        ({"peft": "0.18.0"}, (500 * MIB, None, 1.0)),
        ({"accelerate": "1.10.0"}, (500 * MIB, None, 1.0)),
        ({"autotune": "0.0.9"}, (500 * MIB, None, None)),
        ({"os": "Windows"}, (500 * MIB, 1.0, 1.0)),
    ],
    ids=str,
)
def test_what_depends_on_software_is_of_the_same_software(change: dict[str, str], kept: tuple[Any, ...]) -> None:
    assert medians(measured(), environment=replace(GPU, **change)) == kept


def test_without_an_environment_the_newest_trials_counts() -> None:
    old = measured(1.2, environment=replace(GPU, torch="2.9.0"))
    assert medians(old, measured(1.0))[1] == 1.0


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({"device_used_before_bytes": 300 * MIB}, 200 * MIB),
        ({"tenants": (Tenant(pid=1, name="Xorg", used_bytes=100 * MIB),)}, 400 * MIB),
        ({"tenants": (Tenant(pid=1, name="x", used_bytes=None),)}, None),
        ({"tenants": (Tenant(pid=1, name="x", used_bytes=None),), "device_used_before_bytes": 50 * MIB}, 450 * MIB),
    ],
    ids=str,
)
def test_what_others_hold_is_no_context(change: dict[str, Any], context: int | None) -> None:
    one = measured()
    assert medians(replace(one, report=replace(one.report, **change)))[0] == context


def test_paged_optimizer_state_and_a_cpu_teach_no_context() -> None:
    assert medians(measured(optimizer="paged_adamw_8bit"), measured(environment=an_environment()))[0] is None


OOM = (
    "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 11.63 GiB of which 200.00 MiB is"
    " free. Including non-PyTorch memory, this process has {process} GiB memory in use. Of the allocated memory"
    " 10.50 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
)


def test_a_probe_that_died_tells_its_context() -> None:
    assert medians(died(OOM.format(process="11.25")))[0] == pytest.approx(256 * MIB)


def test_without_the_process_a_death_bounds_the_context_from_above() -> None:
    text = OOM.replace("this process has {process} GiB memory in use. ", "")
    bound = (11.63 - 11) * GIB - 200 * MIB
    assert medians(died(text))[0] is None
    assert medians(measured(context=600 * MIB), died(text))[0] == pytest.approx((600 * MIB + bound) / 2, rel=1e-3)
    assert medians(measured(context=300 * MIB), died(text))[0] == 300 * MIB


def test_what_was_tried_and_free_bounds_the_context_from_below() -> None:
    text = "CUDA out of memory. Tried to allocate 1.00 GiB (GPU 0; 11.63 GiB total capacity; 500.00 MiB free;"
    bound = (11.63 - 10) * GIB - 500 * MIB
    assert medians(measured(), died(text))[0] == pytest.approx((500 * MIB + bound) / 2, rel=1e-3)


def test_a_death_beyond_the_predicted_peak_raises_the_ratio_and_one_before_it_does_not() -> None:
    beyond = died(OOM.format(process="11.25"))  # 10.5 + 1 GiB against 9, more than any prediction is wrong
    wanted = died(OOM.format(process="11.25"), prediction=predicted(peak_allocated_bytes=10 * GIB))
    assert medians(beyond)[1] is None
    assert medians(wanted)[1] == pytest.approx((11.5 * GIB - 20 * MIB) / (10 * GIB))
    assert medians(died("no numbers", peak=8 * GIB))[1] is None
    assert medians(died("no numbers", peak=round(9.9 * GIB)), measured(1.0))[1] == pytest.approx(1.05)


def test_the_model_asked_about_goes_before_others() -> None:
    others = [measured(1.0, 1.0, model_fingerprint=f"model {number}") for number in range(3)]
    own = measured(1.1, 2.0, model_fingerprint="mine")
    assert medians(*others, own)[2] == 1.0
    assert medians(*others, own, model_fingerprint="mine")[1:] == (pytest.approx(1.1), 2.0)
    assert medians(*others, own, model_fingerprint="unseen")[2] == 1.0


def a_timed_trace() -> Trace:
    made = a_trace()
    made.programs["first"][0].works.append(optimizer_work())
    return made


def forecast_of(target: Target) -> Forecast:
    return forecast(a_timed_trace(), CONFIG, target)


def test_a_measured_context_is_in_the_forecast_with_its_source() -> None:
    target = with_learned(target_of_card(CARD), learn([measured(context=480 * MIB), measured(context=520 * MIB)]))
    assert target.context is not None
    assert target.context.source == "measured here by 2 probes, driver 580.65.06, torch 2.13.0"
    assert target.context.low_bytes == 480 * MIB - CONTEXT_MARGIN_BYTES
    found = forecast_of(target)
    assert found.device_used_bytes == found.memory.peak_reserved_bytes + 500 * MIB


def test_a_learned_speed_scales_time_and_narrows_its_interval() -> None:
    plain = forecast_of(target_of_card(CARD))
    found = forecast_of(with_learned(target_of_card(CARD), learn([measured(time=t) for t in (1.9, 2.0, 2.1)])))
    assert plain.step_time_s
    assert found.step_time_s == pytest.approx(2 * plain.step_time_s)
    low, high = (edge / found.step_time_s for edge in found.intervals["step_time_s"])
    assert INTERVAL[0] < low == pytest.approx(0.95 * 0.8**0.5)
    assert INTERVAL[1] > high == pytest.approx(1.05 * 1.5**0.5)
    assert found.prediction().time_factor == 2.0


def test_other_models_narrow_the_interval_more_than_more_of_one() -> None:
    one, three = (
        with_learned(target_of_card(CARD), learn([measured(model_fingerprint=str(i * n)) for i in range(3)]))
        for n in (0, 1)
    )
    assert one.time_interval is not None
    assert three.time_interval is not None
    assert one.time_interval[0] < three.time_interval[0] < 1 < three.time_interval[1] < one.time_interval[1]


def test_learned_memory_scales_what_the_allocator_holds_and_its_parts() -> None:
    plain = forecast_of(target_of_card(CARD))
    found = forecast_of(with_learned(target_of_card(CARD), learn([measured(1.1), measured(1.08), measured(1.12)])))
    assert found.memory.peak_allocated_bytes == round(1.1 * plain.memory.peak_allocated_bytes)
    assert found.memory.peak_reserved_bytes == round(1.1 * plain.memory.peak_reserved_bytes)
    assert sum(found.memory.parts.values()) == found.memory.peak_allocated_bytes
    low, high = found.intervals["peak_allocated_bytes"]
    assert low < 1.08 * plain.memory.peak_allocated_bytes < 1.12 * plain.memory.peak_allocated_bytes < high


def test_what_is_reserved_is_as_uncertain_as_what_is_allocated() -> None:
    plain = forecast_of(target_of_card(CARD))
    found = forecast_of(with_learned(target_of_card(CARD), learn([measured(0.8), measured(1.0), measured(1.2)])))
    assert found.memory_factor == 1.0
    (low, high), (wide_low, wide_high) = (one.intervals["peak_reserved_bytes"] for one in (plain, found))
    assert (wide_low, wide_high) == (pytest.approx(0.8 * low, rel=1e-6), pytest.approx(1.2 * high, rel=1e-6))
    added = found.intervals["device_used_bytes"][1] - plain.intervals["device_used_bytes"][1]
    measured_context = CONTEXT_MARGIN_BYTES + 500 * MIB - target_of_card(CARD).context.high_bytes  # type: ignore[union-attr]
    assert added - measured_context == pytest.approx(wide_high - high, abs=2)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_whether_a_config_fits_goes_by_what_was_learned(factor: float) -> None:
    needed = forecast_of(cpu_target("CPU", 64 * GIB)).memory.peak_allocated_bytes
    learned = learn([measured(factor, environment=an_environment())])
    assert forecast_of(with_learned(cpu_target("CPU", needed), learned)).fits is (factor < 1)


def test_a_cpu_has_no_context_and_learns_memory() -> None:
    target = with_learned(cpu_target("CPU", GIB), learn([measured(1.05, environment=an_environment())]))
    assert target.context is None
    assert target.memory_factor == pytest.approx(1.05)


class Traced:
    """A dry runner that knows one trace."""

    def __init__(self, *works: WorkSum) -> None:
        self._trace = a_timed_trace()
        self._trace.programs["first"][0].works.extend(works)

    def forecast(self, source: ModelSource, config: TrainingConfig, target: Target) -> Forecast:
        return forecast(self._trace, config, target)

    def trace(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace:
        return self._trace

    def close(self) -> None: ...


def a_predictor(*history: TrialRecord) -> FitPredictor:
    return FitPredictor(cast(DryRunner, Traced()), a_model(), target_of_card(CARD), GPU, lambda: list(history))


def test_with_lengths_of_a_dataset_time_is_of_them_and_memory_of_full_length() -> None:
    lengths = LengthMix(quantiles=(64.0, 128.0), samples=2, longest=128, longest_untruncated=128, truncated=0)
    runner = cast(DryRunner, Traced(work("memory", moved=1e6)))  # by token
    predictor = FitPredictor(runner, a_model(), target_of_card(CARD), GPU, lengths=lengths)
    mixed, plain = predictor.predict(CONFIG), FitPredictor(runner, a_model(), target_of_card(CARD), GPU).predict(CONFIG)
    assert mixed is not None
    assert plain is not None
    assert mixed.peak_allocated_bytes == plain.peak_allocated_bytes
    assert mixed.step_time_s
    assert plain.step_time_s
    assert mixed.step_time_s < plain.step_time_s
    assert sum((mixed.seconds_by_kind or {}).values()) == pytest.approx(mixed.step_time_s)
    packed = predictor.predict(replace(CONFIG, packing=True))
    assert packed is not None
    assert packed.step_time_s == plain.step_time_s


def test_a_fit_starts_from_what_is_stored_and_goes_on() -> None:
    plain, known = a_predictor().predict(CONFIG), a_predictor(measured(1.0, 2.0)).predict(CONFIG)
    assert plain is not None
    assert known is not None
    assert plain.step_time_s
    assert known.step_time_s == pytest.approx(2 * plain.step_time_s)
    fitting = a_predictor(measured(1.0, 2.0))
    fitting.learn(measured(1.0, 3.0, model_fingerprint=a_model().fingerprint))
    found = fitting.predict(CONFIG)
    assert found is not None
    assert found.step_time_s == pytest.approx(3 * plain.step_time_s)
    assert found.time_factor == 3.0


def test_learning_from_its_own_corrected_predictions_stays_where_it_is() -> None:
    fitting = a_predictor()
    for _ in range(4):
        said = fitting.predict(CONFIG)
        assert said is not None
        assert said.memory_factor
        seen = report(peak_allocated_bytes=round(1.06 * said.peak_allocated_bytes / said.memory_factor))
        fitting.learn(trial(report=seen, prediction=said, environment=GPU))
    assert said.memory_factor == pytest.approx(1.06, rel=1e-6)


@pytest.mark.parametrize(
    ("slug", "card"),
    [
        (DEVICE.slug, "RTX 3060 12GB"),
        ("nvidia-geforce-rtx-3060-8gib", "RTX 3060 8GB"),
        ("tesla-t4-15gib", "T4"),
        ("nvidia-a100-sxm4-80gb-80gib", "A100 SXM 80GB"),
        ("nvidia-h100-80gb-hbm3-80gib", "H100 SXM"),
        ("nvidia-h200-140gib", "H200 SXM"),
    ],
)
def test_a_database_is_found_by_its_cards_name_and_memory(slug: str, card: str) -> None:
    assert is_of_card(slug, find_card(card).card)
    assert not is_of_card(slug, find_card("RTX 4090").card)
    assert not is_of_card("amd-epyc-7b13", find_card(card).card)


def test_an_estimate_of_a_card_that_is_known_here_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    question = estimate_question.Question(model=a_model(), config=CONFIG, given=True, target=target_of_card(CARD))
    assert estimate_question.with_what_is_known(question) == question
    with open_store(tmp_path, DEVICE) as store:
        for _ in range(3):
            store.append(measured(1.004, 1.25, environment=INSTALLED))
    known = estimate_question.with_what_is_known(question)
    assert known.target.time_factor == 1.25
    assert known.target.context is not None
    assert "measured here by 3 probes" in known.target.context.source
    said = capsys.readouterr().err
    assert said == "3 trials of this card were measured here: context 500.0 MiB, speed × 0.80, memory × 1.004\n"


def test_an_estimate_learns_of_this_autotune_and_the_installed_libraries_alone(tmp_path: Path) -> None:
    other = replace(INSTALLED, torch="2.1.0", autotune="0.0.1")
    with open_store(tmp_path, DEVICE) as store:
        store.append(measured(1.2, 3.0, environment=other))
    learned = learned_here(CARD, a_model(), tmp_path)
    assert learned is not None
    assert (learned.context, learned.memory, learned.time) == (None, None, None)
    with open_store(tmp_path, DEVICE) as store:
        store.append(measured(1.01, 1.5, environment=replace(INSTALLED, driver="590.1")))
        store.append(measured(1.2, 3.0, 700 * MIB, environment=replace(other, driver="590.1")))
    learned = learned_here(CARD, a_model(), tmp_path)
    assert learned is not None
    assert [part and round(part.median, 3) for part in (learned.context, learned.memory, learned.time)] == [
        500 * MIB,
        1.01,
        1.5,
    ]


def test_a_database_of_others_trials_alone_teaches_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path, DEVICE) as store:
        store.append(measured(environment=INSTALLED, origin=Origin.DATABASE))
    assert learned_here(CARD, a_model(), tmp_path) is None


def test_trials_that_teach_nothing_are_not_spoken_of(tmp_path: Path) -> None:
    assert learned_here(CARD, a_model(), tmp_path) is None
    with open_store(tmp_path, DEVICE) as store:
        store.append(died("", prediction=None))
    learned = learned_here(CARD, a_model(), tmp_path)
    assert learned is not None
    assert learned_line(learned) is None


def test_a_database_that_cannot_be_read_costs_a_line_and_not_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path))
    (tmp_path / "gpus").mkdir()
    (tmp_path / "gpus" / f"{DEVICE.slug}.db").write_text("not a database")
    question = estimate_question.Question(model=a_model(), config=CONFIG, given=True, target=target_of_card(CARD))
    assert estimate_question.with_what_is_known(question) == question
    assert "left out" in capsys.readouterr().err


def test_the_newest_trials_are_read_oldest_first(tmp_path: Path) -> None:
    with open_store(tmp_path, DEVICE) as store:
        for _ in range(5):
            store.append(trial())
        assert [row.id for row in store.trials(latest=2)] == [4, 5]
