"""A run's report: what died, the evidence, what was changed, what it cost, what was lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.recover.facts import Action, Batch, Decision, EndedBy, Incident, Phase
from autotune.recover.plan import RunState
from autotune.recover.report import incident_line, report_text
from autotune.values import GIB, Judgement, Verdict

HALF = {"micro_batch_size": 2, "gradient_accumulation_steps": 8}
OOM = Judgement(
    verdict=Verdict.DEVICE_OOM,
    evidence=('the device allocator\'s message: "CUDA out of memory."', "in phase forward"),
    numbers={"tried_bytes": 2 * GIB},
)
INCIDENT = Incident(
    run_id="r1",
    number=1,
    attempt=1,
    time_utc="2026-03-04T05:06:07+00:00",
    judgement=OOM,
    phase=Phase.TRAIN,
    ended_by=EndedBy.ITSELF,
    exit_code=1,
    signal=None,
    step=137,
    batch=Batch(samples=4, tokens=1870),
    decision=Decision(action=Action.STEP_DOWN, why="Out of device memory in training step 138.", change=HALF),
    resumed_from="out/checkpoint-100",
    steps_lost=37,
    seconds_lost=333.0,
    message="CUDA out of memory.",
)
STATE = RunState(
    run_id="r1",
    argv=("python", "train.py"),
    cwd="/home/x",
    attempts=2,
    changed=HALF,
    incidents=(INCIDENT,),
    finished=True,
    exit_code=0,
)


def test_a_recovered_run_reads_from_its_end_to_each_incident() -> None:
    assert report_text(STATE) == (
        """\
# Run r1

- command: `python train.py`
- finished well, in 2 attempts
- 1 incident, 1 recovered; 37 finished steps done again, 6 min of training
- now runs with: micro batch 2, accumulation 8

## Attempts

| attempt | ended (UTC) | last step | died of | then | steps done again |
|---|---|---|---|---|---|
| 1 | 2026-03-04T05:06:07+00:00 | 137 | device_oom in train | stepped down: micro batch 2, accumulation 8 | 37 |
| 2 | | | finished well | | |

## Incident 1: device_oom in train

- attempt 1, 2026-03-04T05:06:07+00:00, exit code 1
- last finished step: 137; it was at a batch of 4 × 1,870 tokens
- its last words: `CUDA out of memory.`
- evidence:
  - `the device allocator's message: "CUDA out of memory."`
  - `in phase forward`
- numbers: tried 2.00 GiB
- decision: Out of device memory in training step 138.
- changed: micro batch 2, accumulation 8
- cost: resumed from `out/checkpoint-100`; 37 steps after it done again, 6 min of training
"""
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps_lost": 0}, "resumed from `out/checkpoint-100`; no step was lost"),
        ({"steps_lost": 1, "seconds_lost": 4.0}, "1 step after it done again, 4 s of training"),
        ({"steps_lost": None}, "how many steps are done again is not known"),
        ({"resumed_from": None, "steps_lost": 137}, "began again from the start: no checkpoint; 137 steps"),
        (
            {"decision": Decision(action=Action.STOP, why="It was no lack of memory.")},
            "what its checkpoints hold is kept",
        ),
        ({"signal": 9, "exit_code": -9, "ended_by": EndedBy.STALL}, "signal 9, ended by us (stall)"),
        ({"exit_code": None}, "could not be started"),
        ({"exit_code": 143, "ended_by": EndedBy.USER}, "ended by the user"),
        ({"step": None, "batch": None}, "last finished step: not known\n"),
    ],
)
def test_each_kind_of_end_and_loss_is_said(changes: dict[str, Any], line: str) -> None:
    assert line in report_text(replace(STATE, incidents=(replace(INCIDENT, **changes),)))


def test_a_run_that_goes_on_or_failed_says_so() -> None:
    assert "goes on, in attempt 2" in report_text(replace(STATE, finished=False, exit_code=None))
    assert "ended with exit code 1, after 2 attempts" in report_text(replace(STATE, exit_code=1))
    assert "0 incidents" in report_text(replace(STATE, incidents=()))


def test_what_a_trainer_prints_is_neither_markdown_nor_a_line_of_its_own() -> None:
    evil = "`` ```\n# head\x1b[2J <b>|</b>"
    judgement = replace(OOM, evidence=(evil,), settle=evil)
    decision = replace(INCIDENT.decision, why=f"It raised {evil}.")
    text = report_text(
        replace(STATE, incidents=(replace(INCIDENT, message=evil, judgement=judgement, decision=decision),))
    )
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("# head")]
    assert "- its last words: ```` `` ``` # head [2J <b>|</b> ````" in text
    assert "\\<b>" in text


def test_secrets_are_masked() -> None:
    token = "hf_" + "a" * 30
    state = replace(
        STATE, argv=("python", "train.py", "--hub_token", "x1y2z3"), incidents=(replace(INCIDENT, message=token),)
    )
    assert token not in report_text(state)
    assert "x1y2z3" not in report_text(state)


def test_an_incident_is_one_line_for_the_terminal() -> None:
    assert incident_line(INCIDENT) == "step 137: device_oom in train; stepped down: micro batch 2, accumulation 8"
    stopped = replace(INCIDENT, step=None, decision=Decision(action=Action.STOP, why="."))
    assert incident_line(stopped) == "device_oom in train; stopped"
