"""What a supervised run tells: counts that read right, the place without a probe's words, and how to go on."""

from __future__ import annotations

import pytest

from autotune.cli.run_text import end_line, incident_lines
from autotune.recover.facts import Action, Decision, Ended, EndedBy, Incident, Phase, Progress
from autotune.recover.plan import RunState
from autotune.values import Judgement, Verdict


def incident(*, lost: int, resumed_from: str | None = None, seconds: float | None = None) -> Incident:
    return Incident(
        run_id="r",
        number=1,
        attempt=1,
        time_utc="2026-01-01T00:00:00+00:00",
        judgement=Judgement(verdict=Verdict.AMBIGUOUS, evidence=("exit code 3", "in phase forward")),
        phase=Phase.TRAIN,
        ended_by=EndedBy.ITSELF,
        exit_code=3,
        signal=None,
        step=None,
        batch=None,
        decision=Decision(action=Action.SAME_AGAIN, why="The same again."),
        resumed_from=resumed_from,
        steps_lost=lost,
        seconds_lost=seconds,
    )


@pytest.mark.parametrize(
    ("told", "last"),
    [
        (incident(lost=0), "  evidence: exit code 3"),
        (incident(lost=1), "  no complete checkpoint: 1 finished step is done again"),
        (incident(lost=1200), "  no complete checkpoint: 1,200 finished steps are done again"),
        (incident(lost=0, resumed_from="out/checkpoint-5"), "  no step is lost"),
        (incident(lost=1, resumed_from="out/checkpoint-5", seconds=0.2), "  1 finished step is done again"),
        (
            incident(lost=9, resumed_from="out/checkpoint-5", seconds=60.0),
            "  9 finished steps are done again, 60 s of training",
        ),
    ],
)
def test_what_an_incident_costs_is_said_in_words_that_fit_the_number(told: Incident, last: str) -> None:
    assert incident_lines(told)[-1] == last


def test_a_run_that_was_stopped_says_how_to_go_on_and_a_job_leaves_that_to_the_daemon() -> None:
    state = RunState(run_id="r", argv=("train",), cwd="/data", exit_code=143)
    ended = Ended(exit_code=None, signal=15, ended_by=EndedBy.USER, progress=Progress(step=1200))
    said = end_line(state, ended, None)
    assert said == "stopped at step 1,200 with exit code 143; the same command with --resume goes on"
    assert "--resume" not in end_line(state, ended, None, is_job=True)
