"""The loop over a run's attempts, with a made-up trainer: what it changes, where it resumes, what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import Interrupted
from autotune.recover.facts import (
    Action,
    Batch,
    Change,
    Checkpoint,
    Death,
    Decision,
    Ended,
    EndedBy,
    Incident,
    Launch,
    Phase,
    Progress,
    Settings,
)
from autotune.recover.plan import RunState, read_state, write_plan, write_state
from autotune.recover.run import Seams, run
from autotune.values import Judgement, Verdict

SETTINGS = Settings(
    output_dir="out", micro_batch_size=8, gradient_accumulation_steps=1, save_strategy="steps", save_steps=5
)
HALF = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
OOM = Ended(
    exit_code=1,
    progress=Progress(reporting=True, phase=Phase.TRAIN, step=12, first_step=0, step_time_s=2.0, output_dir="out"),
    death=Death(exception="torch.OutOfMemoryError", message="no memory", batch=Batch(samples=8, tokens=512), step=12),
)
WELL = Ended(exit_code=0, progress=Progress(reporting=True, phase=Phase.DONE, step=20))


@dataclass
class Command:
    settings: Settings = SETTINGS
    launched: list[tuple[dict[str, Any], Path | None]] = field(default_factory=list)

    def launch(self, change: Change, *, resume: Path | None, folder: Path, fresh: bool = False) -> Launch:
        self.launched.append((dict(change), resume))
        return Launch(argv=("train",), environ={})


@dataclass
class Scene:
    """A run whose attempts end as listed; each bad end is answered with the next decision."""

    ends: list[Ended]
    decisions: list[Decision]
    newest: Checkpoint | None = None
    stopped: bool = False
    command: Command = field(default_factory=Command)
    saved: list[RunState] = field(default_factory=list)
    prepared: list[tuple[Checkpoint, int | None]] = field(default_factory=list)
    recorded: list[tuple[Verdict, int | None]] = field(default_factory=list)
    asked: list[tuple[str | None, float | None]] = field(default_factory=list)
    told: list[Incident] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def attempt_starts(self, number: int, launch: Launch, resume: Checkpoint | None, settings: Settings) -> None: ...

    def incident(self, incident: Incident) -> None:
        self.told.append(incident)

    def ends_with(self, state: RunState, ended: Ended) -> None: ...

    def decide(self, ended: Ended, judgement: Judgement, history: Sequence[Incident], settings: Settings) -> Decision:
        return self.decisions[len(history)]

    def go(self, *, resume: Checkpoint | None = None, state: RunState | None = None) -> RunState:
        ends = iter(self.ends)
        scene = self

        class Heard:
            attempt_starts = staticmethod(scene.attempt_starts)
            incident = staticmethod(scene.incident)
            ends = staticmethod(scene.ends_with)

        def newest(state: RunState) -> Checkpoint | None:
            self.asked.append((state.output_dir, state.began_at))
            return self.newest

        def wait(decision: Decision, ended: Ended) -> int | None:
            self.waited.append(decision.wait_s)
            return 2 if self.stopped else None

        seams = Seams(
            attempt=lambda launch, number, settings, change, resume: next(ends),
            judge=lambda ended: Judgement(verdict=Verdict.FITS if ended.exit_code == 0 else Verdict.DEVICE_OOM),
            decide=self.decide,
            newest=newest,
            prepare=lambda checkpoint, settings: self.prepared.append((checkpoint, settings.micro_batch_size)),
            record=lambda ended, judgement, settings: self.recorded.append(
                (judgement.verdict, settings.micro_batch_size)
            ),
            place=lambda number: Path("/run", f"attempt-{number}"),
            save=self.saved.append,
            observer=Heard(),
            wait=wait,
            now=lambda: 1000.0,
            now_utc=lambda: "2026-01-01T00:00:00+00:00",
        )
        state = state or RunState(run_id="r", argv=("train",), cwd="/data", output_dir="out")
        return run(state, self.command, seams, resume=resume)


def step_down(**change: Any) -> Decision:
    return Decision(action=Action.STEP_DOWN, why="smaller", change=change or HALF)


STOP = Decision(action=Action.STOP, why="no")
TEN = Checkpoint(path=Path("/data/out/checkpoint-10"), step=10)


def test_a_run_that_ends_well_has_one_attempt_and_no_incident() -> None:
    scene = Scene([WELL], [])
    state = scene.go()
    assert (state.exit_code, state.finished, state.attempts, state.incidents) == (0, True, 1, ())


def test_after_out_of_memory_it_resumes_with_the_change_from_the_newest_checkpoint() -> None:
    scene = Scene([OOM, WELL], [step_down()], newest=TEN)
    state = scene.go()
    assert scene.command.launched == [({}, None), (HALF, TEN.path)]
    assert scene.prepared == [(TEN, 4)]
    assert scene.asked == [("out", 1000.0)]
    assert (state.exit_code, state.attempts) == (0, 2)
    assert scene.recorded == [(Verdict.DEVICE_OOM, 8), (Verdict.FITS, 4)]


def test_an_incident_counts_the_steps_that_are_done_again() -> None:
    scene = Scene([OOM, WELL], [step_down()], newest=TEN)
    (incident,) = scene.go().incidents
    assert (incident.steps_lost, incident.seconds_lost, incident.resumed_from) == (2, 4.0, str(TEN.path))
    assert incident.batch == Batch(samples=8, tokens=512)
    assert scene.told == [incident]


def test_without_a_checkpoint_it_starts_anew_and_says_that_all_steps_are_lost() -> None:
    scene = Scene([OOM, WELL], [step_down()])
    (incident,) = scene.go().incidents
    assert scene.command.launched[1] == (HALF, None)
    assert (incident.steps_lost, incident.resumed_from) == (12, None)


def test_changes_add_up() -> None:
    more = {"gradient_checkpointing": "full"}
    scene = Scene([OOM, OOM, WELL], [step_down(), step_down(**more)])
    assert scene.go().changed == HALF | more
    assert scene.command.launched[2][0] == HALF | more


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        (OOM, 1),
        (Ended(exit_code=3), 3),
        (Ended(exit_code=-9), 137),
        (Ended(exit_code=None, signal=15), 143),
        (Ended(exit_code=0, ended_by=EndedBy.STALL), 1),
    ],
)
def test_a_run_that_is_stopped_gives_the_exit_code_of_its_command(ended: Ended, code: int) -> None:
    assert Scene([ended], [STOP]).go().exit_code == code


def test_a_stop_asked_for_while_it_waits_ends_the_run_which_may_be_resumed() -> None:
    scene = Scene([OOM], [Decision(action=Action.WAIT, why="others", wait_s=30.0)], stopped=True)
    state = scene.go()
    assert (scene.waited, state.exit_code, state.attempts) == ([30.0], 130, 1)
    assert not state.finished


def test_a_stop_asked_for_while_a_config_is_chosen_ends_the_run_which_may_be_resumed() -> None:
    class Choosing(Scene):
        def decide(self, *asked: Any) -> Decision:
            stopped = Interrupted("interrupted")
            stopped.exit_code = 143
            raise stopped

    state = Choosing([OOM], []).go()
    assert (state.exit_code, state.finished, state.incidents) == (143, False, ())


def test_a_run_that_the_user_stopped_is_not_finished() -> None:
    ended = Ended(exit_code=-15, signal=15, ended_by=EndedBy.USER)
    assert not Scene([ended], [STOP]).go().finished


def test_every_state_is_saved_before_its_attempt_begins() -> None:
    scene = Scene([OOM, WELL], [step_down()])
    scene.go()
    begun = [state for state in scene.saved if state.attempts == 2 and not state.finished]
    assert begun
    assert begun[0].changed == HALF
    assert len(begun[0].incidents) == 1


def test_a_state_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    scene = Scene([OOM, WELL], [step_down()], newest=TEN)
    state = scene.go()
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600


def test_a_successor_goes_on_with_what_was_changed() -> None:
    first = Scene([OOM], [STOP])
    before = first.go(state=RunState(run_id="r", argv=(), cwd="/data", changed=HALF, attempts=3, began_at=5.0))
    assert first.command.launched == [(HALF, None)]
    assert (before.attempts, before.began_at) == (4, 5.0)


def test_a_plan_says_what_was_changed_and_where_to_resume(tmp_path: Path) -> None:
    import json

    environ = write_plan(tmp_path, run_id="r", number=2, settings=SETTINGS, changed=HALF, resume=TEN.path)
    plan = json.loads(Path(environ["AUTOTUNE_PLAN"]).read_text())
    assert plan["schema"] == "autotune.plan/1"
    assert plan["config"]["micro_batch_size"] == 4
    assert plan["changed"] == HALF
    assert plan["resume_from_checkpoint"] == str(TEN.path)
    assert plan["events"].startswith(str(tmp_path))
