"""Which config a run goes on with after it ran out of device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.recover.decide import Options, decide
from autotune.recover.expected import needs_as_much
from autotune.recover.facts import (
    Action,
    Batch,
    Death,
    Decision,
    Ended,
    EndedBy,
    Incident,
    Phase,
    Progress,
    Settings,
)
from autotune.recover.longest import config_of, died_earlier, longest_batch
from autotune.recover.policy import Policy
from autotune.recover.step_down import Nothing, StepDown, next_config
from autotune.values import GIB, MIB, AllocatorSetting, Judgement, LossPath, Trainer, TrainingConfig, Verdict
from tests.fakes import FakePredictor, Law, a_cpu, a_gpu
from tests.trial_records import out_of_memory_trial, report, trial

LAW = Law()
OOM = Judgement(verdict=Verdict.DEVICE_OOM)
CPU = a_cpu()
RUN = Settings(sequence_length=512, micro_batch_size=8, gradient_accumulation_steps=2, gradient_checkpointing="off")


def tells(*names: str) -> Callable[[str, Any], bool]:
    return lambda name, value: name in names


SIZES = tells("micro_batch_size", "gradient_accumulation_steps")
MORE = tells("micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "allocator")


def a_death(batch: Batch | None, **progress: Any) -> Ended:
    told = Progress(**{"reporting": True, "phase": Phase.TRAIN, "step": 9, "world_size": 1, **progress})
    return Ended(exit_code=1, progress=told, death=Death(exception="OOM", phase=Phase.TRAIN, batch=batch, step=9))


def ask(run: Settings, ended: Ended, **options: Any) -> StepDown | Nothing:
    defaults: dict[str, Any] = {"can": SIZES, "device": CPU, "allowed_bytes": None, "judgement": OOM}
    asked = {**defaults, **options}
    return next_config(run, ended, asked.pop("judgement"), **asked)


def offered(run: Settings, ended: Ended, **options: Any) -> StepDown:
    found = ask(run, ended, **options)
    assert isinstance(found, StepDown)
    return found


def peak(micro: int, tokens: int, **changes: Any) -> int:
    return LAW.peak_bytes(TrainingConfig(micro_batch_size=micro, sequence_length=tokens, **changes))


def test_the_fastest_predicted_config_with_memory_for_the_longest_batch_is_taken() -> None:
    allowed = peak(3, 512)
    found = offered(
        RUN,
        a_death(Batch(samples=8, tokens=300)),
        predictor=FakePredictor(allowed_bytes=allowed),
        allowed_bytes=allowed,
    )
    assert (found.source, found.covers_longest) == ("predicted", True)
    assert found.change == {"micro_batch_size": 2, "gradient_accumulation_steps": 8}


def test_checkpointing_is_weighed_against_a_smaller_micro_batch_by_time() -> None:
    allowed = peak(3, 512)
    slow_when_small = FakePredictor(law=replace(LAW, half_speed_tokens=5000), allowed_bytes=allowed)
    found = offered(RUN, a_death(Batch(samples=8, tokens=512)), predictor=slow_when_small, can=MORE)
    assert found.change["gradient_checkpointing"] == "full"
    assert found.config.micro_batch_size > 2
    assert slow_when_small.law.peak_bytes(found.config) <= allowed


def test_a_death_that_was_predicted_to_fit_moves_every_prediction_by_what_was_missing() -> None:
    low = FakePredictor(memory_error=0.7, allowed_bytes=peak(7, 512))
    found = offered(RUN, a_death(Batch(samples=8, tokens=512)), predictor=low)
    assert low.law.peak_bytes(found.config) <= peak(7, 512)
    assert found.needed_bytes is not None
    assert found.needed_bytes > low.predict(found.config).peak_allocated_bytes  # type: ignore[union-attr]


def test_a_batch_that_passed_moves_the_predictions_too() -> None:
    ended = a_death(None, longest_seen=Batch(samples=8, tokens=200), peak_allocated_bytes=round(peak(8, 200) * 1.4))
    for error in (1.0, 0.6):
        predictor = FakePredictor(memory_error=error, allowed_bytes=peak(6, 512))
        found = offered(RUN, ended, predictor=predictor, device=a_gpu())
        assert found.config.micro_batch_size == 4
        assert found.needed_bytes == pytest.approx(1.4 * peak(4, 512), rel=0.03)


def test_what_was_measured_goes_before_what_is_only_predicted() -> None:
    measured = trial(
        sequence_length=512,
        micro_batch_size=2,
        gradient_accumulation_steps=8,
        report=report(device_used_bytes=peak(2, 512), peak_reserved_bytes=peak(2, 512)),
    )
    predictor = FakePredictor(allowed_bytes=peak(5, 512))
    ended = a_death(Batch(samples=8, tokens=512))
    assert offered(RUN, ended, predictor=predictor).config.micro_batch_size == 4
    found = offered(RUN, ended, predictor=predictor, trials=[measured])
    assert (found.source, found.config.micro_batch_size) == ("measured", 2)
    short = replace(measured, config=replace(measured.config, sequence_length=256))
    assert offered(RUN, ended, predictor=predictor, trials=[short]).source == "predicted"


def test_a_config_that_a_stored_trial_died_with_is_not_taken() -> None:
    died = out_of_memory_trial(sequence_length=512, micro_batch_size=4, report=report(limit_bytes=8 * GIB))
    ended = a_death(Batch(samples=8, tokens=512))
    predictor = FakePredictor(allowed_bytes=peak(5, 512))
    found = offered(RUN, ended, predictor=predictor, trials=[died], allowed_bytes=peak(5, 512))
    assert found.config.micro_batch_size == 2


def test_an_earlier_death_of_the_run_counts_whatever_its_model_adds_to_the_config() -> None:
    ended = a_death(Batch(samples=2, tokens=512), micro_batch_size=2, gradient_accumulation_steps=8)
    base = TrainingConfig(sequence_length=512, micro_batch_size=2, loss=LossPath.CHUNKED, trainer=Trainer.TRL)
    earlier = TrainingConfig(sequence_length=400, micro_batch_size=2, gradient_checkpointing="full")
    asked: dict[str, Any] = {"base": base, "can": MORE, "predictor": FakePredictor(allowed_bytes=peak(8, 512))}
    assert offered(RUN, ended, **asked).config.micro_batch_size == 2
    assert offered(RUN, ended, died=[earlier], **asked).config.micro_batch_size == 1


def test_without_a_model_the_next_smaller_micro_batch_that_is_a_real_step_is_taken() -> None:
    run = replace(RUN, micro_batch_size=12, gradient_accumulation_steps=5)
    found = offered(run, a_death(Batch(samples=12, tokens=512)))
    assert (found.source, found.change) == ("ladder", {"micro_batch_size": 6, "gradient_accumulation_steps": 10})


def test_without_a_model_a_late_longer_batch_steps_down_for_the_longest_possible() -> None:
    late = a_death(Batch(samples=8, tokens=256), dataset_longest=1000)
    found = offered(replace(RUN, sequence_length=1024), late)
    assert found.config.sequence_length == 1000
    assert found.config.micro_batch_size * 1000 < 8 * 256


def test_without_a_model_the_batches_that_passed_tell_how_large_the_step_must_be() -> None:
    peaks = dict.fromkeys(("peak_allocated_bytes", "peak_reserved_bytes"), 900 * MIB)
    passed = {"longest_seen": Batch(samples=8, tokens=128), **peaks}
    near = a_death(Batch(samples=8, tokens=512), **passed)
    assert offered(RUN, near, allowed_bytes=1000 * MIB).config.micro_batch_size == 4
    assert offered(RUN, near, allowed_bytes=910 * MIB, device=a_gpu()).config.micro_batch_size == 2


def test_on_the_cpu_a_prediction_is_moved_by_all_else_that_the_process_holds() -> None:
    others = 700 * MIB  # of data beside tensors: libraries, the interpreter
    seen = {"longest_seen": Batch(samples=8, tokens=200), "peak_reserved_bytes": peak(8, 200) + others}
    limit = peak(3, 512) + others
    predictor = FakePredictor(allowed_bytes=limit)
    found = offered(RUN, a_death(Batch(samples=8, tokens=512), **seen), predictor=predictor, allowed_bytes=limit)
    assert found.needed_bytes == peak(2, 512) + others


def test_checkpointing_comes_after_the_smallest_micro_batch() -> None:
    smallest = replace(RUN, micro_batch_size=1, gradient_accumulation_steps=16)
    found = offered(smallest, a_death(Batch(samples=1, tokens=512)), can=MORE)
    assert found.change == {"gradient_checkpointing": "every_2"}
    full_alone = lambda name, value: name == "gradient_checkpointing" and value == "full"  # noqa: E731
    assert offered(smallest, a_death(Batch(samples=1, tokens=512)), can=full_alone).change == {
        "gradient_checkpointing": "full"
    }


def test_nothing_is_left_at_the_bottom_and_says_how_much_is_missing() -> None:
    bottom = replace(RUN, micro_batch_size=1, gradient_accumulation_steps=16)
    ended = a_death(Batch(samples=1, tokens=512))
    assert isinstance(ask(bottom, ended), Nothing)
    predictor = FakePredictor(allowed_bytes=peak(1, 512) - 50 * MIB)
    found = ask(bottom, ended, predictor=predictor)
    assert isinstance(found, Nothing)
    assert found.missing_bytes == 50 * MIB
    assert isinstance(ask(Settings(sequence_length=512), ended), Nothing)


def test_a_length_that_can_never_fit_still_steps_down_for_the_batch_at_hand() -> None:
    long = replace(RUN, sequence_length=8192)
    found = offered(long, a_death(Batch(samples=8, tokens=512)))
    assert (found.config.micro_batch_size, found.covers_longest) == (4, False)


def test_segments_that_grow_come_with_every_step_and_alone_only_where_memory_lay_in_pieces() -> None:
    ended = a_death(Batch(samples=8, tokens=512))
    pieces = Judgement(verdict=Verdict.DEVICE_OOM, numbers={"reserved_unallocated_bytes": 2 * GIB, "tried_bytes": GIB})
    grows = AllocatorSetting.EXPANDABLE_SEGMENTS.value
    assert offered(RUN, ended, can=MORE, device=a_gpu()).change == {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "allocator": grows,
    }
    assert offered(RUN, ended, can=MORE, device=a_gpu(), judgement=pieces).change == {"allocator": grows}
    had = AllocatorSetting.EXPANDABLE_SEGMENTS
    assert "allocator" not in offered(RUN, ended, can=MORE, device=a_gpu(), allocator=had).change


def test_the_evaluations_batch_follows_a_smaller_training_one() -> None:
    run = replace(RUN, eval_micro_batch_size=8)
    every = tells("micro_batch_size", "gradient_accumulation_steps", "eval_micro_batch_size")
    ended = a_death(Batch(samples=8, tokens=512))
    assert offered(run, ended, can=every).change["eval_micro_batch_size"] == 4
    assert "eval_micro_batch_size" not in offered(run, ended, can=SIZES).change


@pytest.mark.parametrize(
    ("length", "dataset", "seen", "died_on", "longest"),
    [
        (2048, None, None, None, 2048),
        (2048, 700, None, None, 704),
        (2048, 5000, None, None, 2048),
        (None, 700, None, None, 704),
        (None, None, 300, 500, 500),
        (1024, 100, 300, None, 300),
        (None, None, None, None, None),
    ],
)
def test_the_longest_batch_is_the_datasets_then_the_settings_then_what_was_seen(
    length: int | None, dataset: int | None, seen: int | None, died_on: int | None, longest: int | None
) -> None:
    progress = Progress(dataset_longest=dataset, longest_seen=(seen and Batch(samples=1, tokens=seen)) or None)
    batch = Batch(samples=1, tokens=died_on) if died_on else None
    assert longest_batch(Settings(sequence_length=length), progress, batch) == longest


def test_what_the_trainer_says_of_its_sizes_goes_before_what_its_command_says() -> None:
    config = config_of(RUN, Progress(micro_batch_size=4, gradient_accumulation_steps=3, world_size=2))
    assert config is not None
    assert (config.micro_batch_size, config.effective_batch_size) == (4, 24)
    unknown = replace(RUN, trainer="axolotl", attention="flex", gradient_checkpointing="full")
    config = config_of(unknown, Progress())
    assert config is not None
    assert (config.micro_batch_size, config.gradient_checkpointing) == (8, "full")


def _incident(number: int, batch: Batch | None, change: dict[str, Any]) -> Incident:
    return Incident(
        run_id="r",
        number=number,
        attempt=number,
        time_utc="2026-01-01T00:00:00+00:00",
        judgement=OOM,
        phase=Phase.TRAIN,
        ended_by=EndedBy.ITSELF,
        exit_code=1,
        signal=None,
        step=number,
        batch=batch,
        decision=Decision(action=Action.STEP_DOWN, why="", change=change),
    )


def test_earlier_deaths_are_known_with_the_settings_that_they_had() -> None:
    half = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}
    history = [
        _incident(1, Batch(samples=8, tokens=300), half),
        replace(_incident(2, None, {}), phase=Phase.EVALUATE),
        _incident(3, None, {"gradient_checkpointing": "full"}),
    ]
    found = died_earlier(RUN, history, Progress(micro_batch_size=4, gradient_accumulation_steps=4), tokens=512)
    assert [(c.micro_batch_size, c.sequence_length, c.gradient_checkpointing) for c in found] == [
        (8, 300, "off"),
        (4, 512, "off"),
    ]


@settings(max_examples=150, deadline=None)
@given(
    micro=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    steps=st.sampled_from([1, 2, 4, 5]),
    length=st.sampled_from([None, 256, 512, 2048]),
    allowed_mib=st.integers(150, 6000),
    error=st.sampled_from([0.6, 0.9, 1.0, 1.1]),
    can=st.sampled_from([SIZES, MORE, tells("gradient_checkpointing"), tells()]),
    with_model=st.booleans(),
    on_gpu=st.booleans(),
)
def test_stepping_down_ends_keeps_the_effective_batch_and_never_comes_back_to_what_died(
    micro: int,
    steps: int,
    length: int | None,
    allowed_mib: int,
    error: float,
    can: Callable[[str, Any], bool],
    with_model: bool,
    on_gpu: bool,
) -> None:
    """Every step is told to a run that dies wherever the law says so."""
    run = replace(RUN, micro_batch_size=micro, gradient_accumulation_steps=steps, sequence_length=length)
    died: list[TrainingConfig] = []
    for _ in range(40):
        micro_now = run.micro_batch_size or 1
        batch = Batch(samples=micro_now, tokens=min(300, length or 300))
        ended = a_death(batch)
        predictor = FakePredictor(memory_error=error, allowed_bytes=allowed_mib * MIB) if with_model else None
        found = ask(
            run,
            ended,
            can=can,
            predictor=predictor,
            died=died,
            device=a_gpu() if on_gpu else CPU,
            allowed_bytes=allowed_mib * MIB,
        )
        now = config_of(run, ended.progress, tokens=batch.tokens)
        assert now is not None
        died.append(now)
        if isinstance(found, Nothing):
            return
        assert found.change
        assert found.config.effective_batch_size == micro * steps
        assert not any(needs_as_much(replace(found.config, allocator=d.allocator), d) for d in died)
        run = replace(run, **{name: value for name, value in found.change.items() if name != "allocator"})
    raise AssertionError("stepping down does not end")


@pytest.mark.parametrize("limit_mib", [600, 900, 1500, 2500])
@pytest.mark.parametrize("error", [None, 0.75, 1.0, 1.1])
@pytest.mark.parametrize("knows_dataset", [True, False])
def test_a_run_whose_batches_grow_is_brought_through_within_its_restarts(
    limit_mib: int, error: float | None, knows_dataset: bool
) -> None:
    """Batches of 60 to 500 tokens, each longer than the last; out of memory wherever the law says so."""
    run, died, history = RUN, [], list[Incident]()
    limit = limit_mib * MIB
    lengths = range(60, 501, 40)
    while True:
        now = config_of(run, Progress())
        assert now is not None
        batches = [replace(now, sequence_length=tokens) for tokens in lengths]
        fatal = next((batch for batch in batches if LAW.peak_bytes(batch) > limit), None)
        if fatal is None:
            return
        passed = [batch for batch in batches if batch.sequence_length < fatal.sequence_length]
        ended = a_death(
            Batch(samples=now.micro_batch_size, tokens=fatal.sequence_length),
            steps=len(passed),
            dataset_longest=500 if knows_dataset else None,
            longest_seen=Batch(samples=now.micro_batch_size, tokens=passed[-1].sequence_length) if passed else None,
            peak_reserved_bytes=LAW.peak_bytes(passed[-1]) if passed else None,
        )
        predictor = FakePredictor(memory_error=error, allowed_bytes=limit) if error else None
        options = Options(
            smaller=lambda run=run, ended=ended, predictor=predictor: ask(
                run, ended, can=MORE, predictor=predictor, died=died, allowed_bytes=limit
            ),
            can=MORE,
        )
        found = decide(ended, OOM, history, Policy(), options, now=datetime(2026, 1, 1, tzinfo=UTC))
        assert found.action is Action.STEP_DOWN, found.why
        history.append(_incident(len(history) + 1, None, found.change))
        died.append(fatal)
        run = replace(run, **found.change)
        assert len(history) <= (3 if error else 5)
