"""What is done about each kind of death, wherever it happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.recover.decide import Options, decide
from autotune.recover.facts import Action, Batch, Death, Decision, Ended, EndedBy, Incident, Phase, Progress
from autotune.recover.policy import Policy
from autotune.recover.step_down import Nothing, StepDown
from autotune.values import GIB, Judgement, TrainingConfig, Verdict

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
HALF = {"micro_batch_size": 2, "gradient_accumulation_steps": 8}
SMALLER = StepDown(
    config=TrainingConfig(sequence_length=2048, micro_batch_size=2),
    change=HALF,
    source="predicted",
    covers_longest=True,
)
EVERYTHING = Options(
    smaller=lambda: SMALLER, can=lambda name, value: True, eval_micro_batch_size=8, workers=8, offloads=True
)
NOTHING = Options(smaller=lambda: Nothing(why="nothing is left", missing_bytes=GIB), can=lambda name, value: False)
KILL = {"exit_code": -9, "signal": 9}


def end(phase: Phase = Phase.TRAIN, *, step: int | None = 40, **changes: Any) -> Ended:
    progress = Progress(phase=phase, step=step, steps=step or 0, first_step=0, reporting=True)
    return Ended(**{"exit_code": 1, "progress": progress, **changes})


def judged(verdict: Verdict, **changes: Any) -> Judgement:
    return Judgement(verdict=verdict, evidence=("the evidence",), action="Do this.", **changes)


def incident(ended: Ended, judgement: Judgement, decision: Decision, number: int = 1, **changes: Any) -> Incident:
    fields: dict[str, Any] = {
        "run_id": "r",
        "number": number,
        "attempt": number,
        "time_utc": (NOW - timedelta(minutes=10 - number)).isoformat(),
        "judgement": judgement,
        "phase": ended.phase,
        "ended_by": ended.ended_by,
        "exit_code": ended.exit_code,
        "signal": ended.signal,
        "step": ended.progress.step,
        "batch": None,
        "decision": decision,
    }
    return Incident(**{**fields, **changes})


def decided(
    ended: Ended,
    judgement: Judgement,
    history: Sequence[Incident] = (),
    options: Options = EVERYTHING,
    **limits: Any,
) -> Decision:
    return decide(ended, judgement, history, Policy(**limits), options, now=NOW)


ANYWHERE = tuple(Phase)
FIRST_DEATH: list[tuple[Verdict, tuple[Phase, ...], dict[str, Any], Action]] = [
    (Verdict.DEVICE_OOM, (Phase.TRAIN,), {}, Action.STEP_DOWN),
    (Verdict.DEVICE_OOM, (Phase.EVALUATE,), {}, Action.SMALLER_EVALUATION),
    (Verdict.DEVICE_OOM, (Phase.SAVE, Phase.DONE), {}, Action.STOP),
    (Verdict.DEVICE_OOM, (Phase.START, Phase.LOAD), {"step": None}, Action.STOP),
    (Verdict.SPILL, (Phase.TRAIN, Phase.SAVE), {"ended_by": EndedBy.SPILL}, Action.STEP_DOWN),
    (Verdict.SPILL, (Phase.EVALUATE,), {"ended_by": EndedBy.SPILL}, Action.SMALLER_EVALUATION),
    (Verdict.HOST_OOM, (Phase.TRAIN, Phase.EVALUATE, Phase.SAVE), KILL, Action.SPARE_HOST),
    (Verdict.HOST_OOM, (Phase.START, Phase.LOAD), {**KILL, "step": None}, Action.STOP),
    (Verdict.HOST_OOM, (Phase.DONE,), KILL, Action.STOP),
    (Verdict.NOT_OOM, ANYWHERE, {}, Action.STOP),
    (Verdict.AMBIGUOUS, ANYWHERE, {}, Action.SAME_AGAIN),
    (Verdict.AMBIGUOUS, ANYWHERE, KILL, Action.SAME_AGAIN),
    (Verdict.TIMEOUT, ANYWHERE, {**KILL, "ended_by": EndedBy.STALL}, Action.SAME_AGAIN),
    (Verdict.TIMEOUT, (Phase.START, Phase.LOAD), {**KILL, "ended_by": EndedBy.START_LIMIT}, Action.SAME_AGAIN),
    (Verdict.DEVICE_LOST, ANYWHERE, {}, Action.SAME_AGAIN),
    (Verdict.INTERRUPTED, ANYWHERE, {"exit_code": -15, "signal": 15}, Action.SAME_AGAIN),
    (Verdict.INTERRUPTED, ANYWHERE, {"exit_code": -2, "signal": 2}, Action.STOP),
    (Verdict.INTERRUPTED, ANYWHERE, {"exit_code": -15, "signal": 15, "ended_by": EndedBy.USER}, Action.STOP),
    (Verdict.FITS, (Phase.DONE, Phase.TRAIN), {"exit_code": 0}, Action.FINISH),
]


def test_a_trainer_that_reports_nothing_may_have_trained() -> None:
    silent = Ended(exit_code=1)
    found = decided(silent, judged(Verdict.DEVICE_OOM))
    assert (found.action, found.change) == (Action.STEP_DOWN, HALF)
    assert found.why.startswith("Out of device memory at a step that was not reported: micro batch 2")
    assert decided(silent, judged(Verdict.HOST_OOM)).action is Action.SPARE_HOST
    assert decided(silent, judged(Verdict.DEVICE_OOM), options=NOTHING).action is Action.STOP


def test_a_death_at_the_start_after_a_change_says_that_the_change_was_ours() -> None:
    down = Decision(action=Action.STEP_DOWN, why="smaller", change=HALF)
    before = [incident(end(), judged(Verdict.DEVICE_OOM), down)]
    found = decided(end(Phase.START, step=None), judged(Verdict.NOT_OOM), before)
    assert found.action is Action.STOP
    assert "a change of autotune's (micro batch 2, accumulation 8), which may be the reason" in found.why
    assert "autotune" not in decided(end(Phase.START, step=None), judged(Verdict.NOT_OOM)).why
    assert "autotune" not in decided(end(Phase.TRAIN), judged(Verdict.NOT_OOM), before).why


@pytest.mark.parametrize(
    ("verdict", "phase", "facts", "action"),
    [(verdict, phase, facts, action) for verdict, phases, facts, action in FIRST_DEATH for phase in phases],
)
def test_the_first_death_of_each_kind_has_one_action(
    verdict: Verdict, phase: Phase, facts: dict[str, Any], action: Action
) -> None:
    found = decided(end(phase, **facts), judged(verdict))
    assert found.action is action
    assert found.why.endswith(".")
    assert found.why[0].isupper()


@pytest.mark.parametrize("verdict", [*Verdict])
@pytest.mark.parametrize("phase", [*Phase])
def test_only_a_lack_of_device_memory_makes_the_micro_batch_smaller(verdict: Verdict, phase: Phase) -> None:
    found = decided(end(phase), judged(verdict))
    assert ("micro_batch_size" in found.change) == (found.action is Action.STEP_DOWN)
    assert found.action is not Action.STEP_DOWN or verdict in (Verdict.DEVICE_OOM, Verdict.SPILL)


def test_a_death_at_the_first_step_says_that_the_config_was_wrong() -> None:
    found = decided(end(step=0), judged(Verdict.DEVICE_OOM))
    assert (found.action, found.change) == (Action.STEP_DOWN, HALF)
    assert "wrong from the start" in found.why
    assert "wrong from the start" not in decided(end(step=5), judged(Verdict.DEVICE_OOM)).why


def test_a_late_death_names_the_longer_batch() -> None:
    death = Death(exception="torch.OutOfMemoryError", batch=Batch(samples=4, tokens=1870), step=137)
    progress = Progress(phase=Phase.TRAIN, step=137, steps=137, longest_seen=Batch(samples=4, tokens=900))
    found = decided(end(death=death, progress=progress), judged(Verdict.DEVICE_OOM))
    assert "training step 138 (4 × 1,870 tokens)" in found.why
    assert "4 × 900 tokens" in found.why


def test_nothing_left_to_step_down_to_stops_and_says_what_is_missing() -> None:
    found = decided(end(), judged(Verdict.DEVICE_OOM), options=NOTHING)
    assert found.action is Action.STOP
    assert "1.00 GiB are missing" in found.why


def test_the_evaluation_batch_is_halved_to_one_and_training_left_alone() -> None:
    sizes, options, history = [], replace(EVERYTHING, eval_micro_batch_size=6), []
    ended = end(Phase.EVALUATE)
    while (found := decided(ended, judged(Verdict.DEVICE_OOM), history, options)).action is Action.SMALLER_EVALUATION:
        assert set(found.change) == {"eval_micro_batch_size"}
        sizes.append(found.change["eval_micro_batch_size"])
        history.append(incident(ended, judged(Verdict.DEVICE_OOM), found))
        options = replace(options, eval_micro_batch_size=sizes[-1])
    assert sizes == [3, 1]
    assert found.action is Action.STOP
    assert "one sample at a time" in found.why


def test_an_evaluation_batch_that_nobody_names_is_the_one_that_died() -> None:
    death = Death(exception="OOM", phase=Phase.EVALUATE, batch=Batch(samples=8, tokens=100))
    options = replace(EVERYTHING, eval_micro_batch_size=None)
    assert decided(end(Phase.EVALUATE, death=death), judged(Verdict.DEVICE_OOM), options=options).change == {
        "eval_micro_batch_size": 4
    }
    assert decided(end(Phase.EVALUATE), judged(Verdict.DEVICE_OOM), options=NOTHING).action is Action.STOP


def test_workers_go_before_offloading_and_then_it_stops() -> None:
    changes, options, history = [], EVERYTHING, []
    for step in (40, 41, 42, 43):
        ended = end(step=step, **KILL)
        found = decided(ended, judged(Verdict.HOST_OOM), history, options)
        changes.append(found.change)
        history.append(incident(ended, judged(Verdict.HOST_OOM), found))
        options = replace(
            options,
            workers=found.change.get("dataloader_workers", options.workers),
            offloads=options.offloads and "gradient_checkpointing" not in found.change,
        )
    assert changes == [{"dataloader_workers": 2}, {"dataloader_workers": 0}, {"gradient_checkpointing": "full"}, {}]
    assert found.action is Action.STOP


def test_loading_that_worked_before_is_tried_once_more() -> None:
    ended = end(Phase.LOAD, step=None)
    before = incident(end(step=40, **KILL), judged(Verdict.AMBIGUOUS), Decision(action=Action.SAME_AGAIN, why="."))
    for verdict in (Verdict.DEVICE_OOM, Verdict.HOST_OOM):
        first = decided(ended, judged(verdict), [before])
        assert first.action is Action.SAME_AGAIN
        assert decided(ended, judged(verdict), [before, incident(ended, judged(verdict), first)]).action is Action.STOP


def test_an_unclear_death_is_tried_once_more_and_then_stops() -> None:
    first = decided(end(step=4), judged(Verdict.AMBIGUOUS))
    history = [incident(end(step=4), judged(Verdict.AMBIGUOUS), first)]
    found = decided(end(step=7), judged(Verdict.AMBIGUOUS, settle="the log"), history)
    assert found.action is Action.STOP
    assert "the log" in found.why


@pytest.mark.parametrize(
    ("verdict", "facts"),
    [
        (Verdict.TIMEOUT, {"ended_by": EndedBy.STALL}),
        (Verdict.DEVICE_LOST, {}),
        (Verdict.INTERRUPTED, {"exit_code": 143}),
        (Verdict.AMBIGUOUS, KILL),
    ],
)
def test_what_is_not_the_configs_fault_is_tried_twice_again_unless_a_checkpoint_came_between(
    verdict: Verdict, facts: dict[str, Any]
) -> None:
    history: list[Incident] = []
    waits = []
    for step in (10, 11):
        found = decided(end(step=step, **facts), judged(verdict), history)
        assert found.action is Action.SAME_AGAIN
        waits.append(found.wait_s)
        history.append(incident(end(step=step, **facts), judged(verdict), found))
    assert waits == [5, 10]
    assert decided(end(step=12, **facts), judged(verdict), history).action is Action.STOP
    saved = replace(end(step=12, **facts).progress, checkpoint="checkpoint-12", checkpoint_step=12)
    assert decided(end(step=12, **facts, progress=saved), judged(verdict), history).action is Action.SAME_AGAIN


UNCLEAR = judged(Verdict.AMBIGUOUS, settle="free memory on the card when it died")


@pytest.mark.parametrize(
    ("judgement", "facts", "action"),
    [
        (UNCLEAR, {}, Action.STEP_DOWN),
        (judged(Verdict.AMBIGUOUS, settle="its log"), {}, Action.STOP),
        (judged(Verdict.AMBIGUOUS, settle="oom_kill in the cgroup's memory.events"), KILL, Action.SPARE_HOST),
        (judged(Verdict.TIMEOUT), {"ended_by": EndedBy.STALL}, Action.STOP),
        (judged(Verdict.DEVICE_LOST), {}, Action.STOP),
        (judged(Verdict.INTERRUPTED), {"exit_code": 143}, Action.STOP),
    ],
)
def test_the_same_death_at_the_same_place_never_repeats_the_config(
    judgement: Judgement, facts: dict[str, Any], action: Action
) -> None:
    ended = end(step=10, **facts)
    first = decided(ended, judgement, ambiguous_retries=9)
    assert first.action is Action.SAME_AGAIN
    found = decided(ended, judgement, [incident(ended, judgement, first)], ambiguous_retries=9)
    assert found.action is action


def test_memory_that_another_process_took_is_waited_for_or_stepped_down_from_as_asked() -> None:
    taken = {"free_before_bytes": 12 * GIB, "tenants_bytes": 5 * GIB}
    numbers = {"total_bytes": 12 * GIB, "process_bytes": 6 * GIB, "tried_bytes": GIB, "free_bytes": GIB // 4}
    judgement = judged(Verdict.DEVICE_OOM, numbers=numbers)
    ended = end(**taken)
    first = decided(ended, judgement)
    assert (first.action, first.change, first.wait_s) == (Action.WAIT, {}, 600.0)
    assert decided(ended, judgement, on_tenant="step_down").action is Action.STEP_DOWN
    again = decided(ended, judgement, [incident(ended, judgement, first)])
    assert again.action is Action.STEP_DOWN
    for other in (
        end(**{**taken, "free_before_bytes": 7 * GIB}),  # it was there before
        end(**{**taken, "tenants_bytes": GIB // 2}),
    ):
        assert decided(other, judgement).action is Action.STEP_DOWN
    too_large = judged(Verdict.DEVICE_OOM, numbers={**numbers, "tried_bytes": 8 * GIB})
    assert decided(ended, too_large).action is Action.STEP_DOWN


def many(count: int, minutes: float, resumed: Sequence[str | None] = ()) -> list[Incident]:
    """Deaths at different steps, so many minutes apart, the last just now."""
    return [
        incident(
            end(step=number),
            judged(Verdict.DEVICE_OOM),
            Decision(action=Action.STEP_DOWN, why=".", change={"micro_batch_size": 1}),
            number,
            time_utc=(NOW - timedelta(minutes=minutes * (count - number))).isoformat(),
            resumed_from=resumed[number - 1] if resumed else None,
        )
        for number in range(1, count + 1)
    ]


def test_restarts_that_bring_no_checkpoint_are_limited_in_a_window_and_in_all() -> None:
    oom = judged(Verdict.DEVICE_OOM)
    assert decided(end(), oom, many(4, 1)).action is Action.STEP_DOWN
    stopped = decided(end(), oom, many(5, 1))
    assert (stopped.action, "5 restarts within 60 minutes" in stopped.why) == (Action.STOP, True)
    assert decided(end(), oom, many(5, 30)).action is Action.STEP_DOWN
    assert decided(end(), oom, many(20, 30)).action is Action.STOP
    assert decided(end(), oom, many(5, -1000)).action is Action.STOP  # the clock was set back


def test_restarts_count_from_the_last_one_that_brought_a_checkpoint() -> None:
    oom = judged(Verdict.DEVICE_OOM)
    assert decided(end(), oom, many(6, 1, ["a", "a", "b", "b", "b", "b"])).action is Action.STEP_DOWN
    assert decided(end(), oom, many(6, 1, ["a", "b", "b", "b", "b", "b"])).action is Action.STOP


deaths = st.tuples(
    st.sampled_from([verdict for verdict in Verdict if verdict is not Verdict.FITS]),
    st.sampled_from([*Phase]),
    st.sampled_from([None, 0, 3, 3, 8]),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(deaths, min_size=60, max_size=60))
def test_whatever_happens_restarts_end_and_no_death_is_met_twice_with_the_same_again(
    script: list[tuple[Verdict, Phase, int | None, bool]],
) -> None:
    """A run without checkpoints that dies in turn of whatever hypothesis finds; the ladder has three steps."""
    config = {
        "micro_batch_size": 8,
        "eval_micro_batch_size": 4,
        "dataloader_workers": 4,
        "gradient_checkpointing": "off",
    }
    history: list[Incident] = []
    seen: list[tuple[Any, ...]] = []
    for number, (verdict, phase, step, killed) in enumerate(script, start=1):

        def smaller(now: int = config["micro_batch_size"]) -> StepDown | Nothing:
            return replace(SMALLER, change={"micro_batch_size": now // 2}) if now > 1 else Nothing(why="nothing left")

        options = Options(
            smaller=smaller,
            can=lambda name, value: True,
            eval_micro_batch_size=config["eval_micro_batch_size"],
            workers=config["dataloader_workers"],
        )
        ended = end(phase, step=step, **(KILL if killed else {}))
        judgement = judged(verdict, settle="free memory" if verdict is Verdict.AMBIGUOUS else None)
        found = decide(ended, judgement, history, Policy(), options, now=NOW + timedelta(hours=3 * number))
        here = (tuple(config.items()), verdict, phase, step)
        assert here not in seen or found.change or found.action is Action.STOP
        seen.append(here)
        assert seen.count(here) <= 2  # once more at most
        if found.action is Action.STOP:
            break
        config = {**config, **found.change}
        times = (NOW + timedelta(hours=3 * number)).isoformat()
        history.append(incident(ended, judgement, found, number, time_utc=times))
    assert found.action is Action.STOP
    assert len(history) <= Policy().most_restarts
