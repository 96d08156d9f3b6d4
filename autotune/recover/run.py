"""One training command until it ends well or for good: attempt, judge, decide, resume. Its hands are given to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from autotune.errors import Interrupted
from autotune.recover.facts import (
    Action,
    Change,
    Checkpoint,
    Decision,
    Ended,
    EndedBy,
    Incident,
    Launch,
    Progress,
    Settings,
)
from autotune.recover.longest import changed
from autotune.recover.plan import RunState, with_incident
from autotune.recover.policy import last_step
from autotune.values import Judgement, Verdict


class Observer(Protocol):
    """Hears how a run goes."""

    def attempt_starts(self, number: int, launch: Launch, resume: Checkpoint | None, settings: Settings) -> None: ...

    def incident(self, incident: Incident) -> None: ...

    def ends(self, state: RunState, ended: Ended) -> None: ...


class Command(Protocol):
    """What of a `TrainingCommand` the loop needs."""

    @property
    def settings(self) -> Settings: ...

    def launch(self, change: Change, *, resume: Path | None, folder: Path, fresh: bool = False) -> Launch: ...


Decide = Callable[[Ended, Judgement, Sequence[Incident], Settings], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """What a run is given instead of taking it."""

    attempt: Callable[[Launch, int, Settings, Change, Checkpoint | None], Ended]
    judge: Callable[[Ended], Judgement]
    decide: Decide  # raises Interrupted, with an exit code, where a stop was asked for meanwhile
    newest: Callable[[RunState], Checkpoint | None]  # complete, and of this run
    prepare: Callable[[Checkpoint, Settings], None]
    record: Callable[[Ended, Judgement, Settings], None]
    place: Callable[[int], Path]  # the folder of an attempt, made
    save: Callable[[RunState], None]
    observer: Observer
    wait: Callable[[Decision, Ended], int | None]  # before the next attempt; the signal that asked for a stop meanwhile
    now: Callable[[], float]
    now_utc: Callable[[], str]


def run(state: RunState, command: Command, seams: Seams, *, resume: Checkpoint | None = None) -> RunState:
    """Attempt after attempt; gives the state of the run's end, its exit code the command's.

    `resume` is where a run that was interrupted goes on. Raises what the seams raise; the state of each attempt is
    saved before it begins, so that a killed supervisor's successor knows what was tried.
    """
    return _Run(state, command, seams).go(resume)


class _Run:
    def __init__(self, state: RunState, command: Command, seams: Seams) -> None:
        self.state, self.command, self.seams = state, command, seams
        self.settings = changed(command.settings, state.changed or {})

    def go(self, resume: Checkpoint | None) -> RunState:
        while True:
            ended = self.attempt(resume)
            judgement = self.seams.judge(ended)
            self.seams.record(ended, judgement, self.settings)
            if is_well_ended(ended, judgement):
                return self.finish(ended, 0)
            try:
                decision = self.seams.decide(ended, judgement, self.state.incidents, self.settings)
            except Interrupted as error:
                return self.finish(replace(ended, ended_by=EndedBy.USER), error.exit_code)
            resume = None if decision.action is Action.STOP else self.seams.newest(self.state)
            self.note(ended, judgement, decision, resume)
            if decision.action is Action.STOP:
                return self.finish(ended, exit_code_of(ended))
            self.change(decision)
            stopped = self.seams.wait(decision, ended)
            if stopped is not None:
                ended = replace(ended, ended_by=EndedBy.USER, signal=stopped)
                return self.finish(ended, exit_code_of(ended))

    def attempt(self, resume: Checkpoint | None) -> Ended:
        change = self.state.changed or {}
        began = self.seams.now() if self.state.began_at is None else self.state.began_at
        self.state = replace(self.state, attempts=self.state.attempts + 1, began_at=began, exit_code=None)
        self.seams.save(self.state)
        if resume is not None:
            self.seams.prepare(resume, self.settings)
        again = self.state.attempts > 1 and resume is None and self.command.settings.resume_from_checkpoint is None
        place = self.seams.place(self.state.attempts)
        launch = self.command.launch(change, resume=resume.path if resume else None, folder=place, fresh=again)
        self.seams.observer.attempt_starts(self.state.attempts, launch, resume, self.settings)
        ended = self.seams.attempt(launch, self.state.attempts, self.settings, change, resume)
        self.settings = with_reported(self.settings, ended.progress)
        self.state = replace(self.state, output_dir=self.settings.output_dir or self.state.output_dir)
        return ended

    def note(self, ended: Ended, judgement: Judgement, decision: Decision, resume: Checkpoint | None) -> None:
        """Keep the incident, with what it costs: the steps that were finished after the checkpoint are done again."""
        goes_on = decision.action is not Action.STOP
        step, death = last_step(ended), ended.death
        lost = max(0, step - (resume.step if resume else begin_step(ended))) if goes_on and step is not None else None
        pace = ended.progress.step_time_s
        incident = Incident(
            run_id=self.state.run_id,
            number=len(self.state.incidents) + 1,
            attempt=self.state.attempts,
            time_utc=self.seams.now_utc(),
            judgement=judgement,
            phase=ended.phase,
            ended_by=ended.ended_by,
            exit_code=ended.exit_code,
            signal=ended.signal,
            step=step,
            batch=death.batch if death else None,
            decision=decision,
            resumed_from=str(resume.path) if resume and goes_on else None,
            steps_lost=lost,
            seconds_lost=lost * pace if lost is not None and pace is not None else None,
            message=_one_line(death.message if death and death.message else ended.tail),
        )
        self.state = with_incident(self.state, incident)
        self.seams.save(self.state)
        self.seams.observer.incident(incident)

    def change(self, decision: Decision) -> None:
        self.state = replace(self.state, changed={**(self.state.changed or {}), **decision.change})
        self.settings = changed(self.settings, decision.change)
        self.seams.save(self.state)

    def finish(self, ended: Ended, exit_code: int) -> RunState:
        self.state = replace(self.state, finished=ended.ended_by is not EndedBy.USER, exit_code=exit_code)
        self.seams.save(self.state)
        self.seams.observer.ends(self.state, ended)
        return self.state


def is_well_ended(ended: Ended, judgement: Judgement) -> bool:
    return judgement.verdict is Verdict.FITS and ended.exit_code == 0 and ended.ended_by is EndedBy.ITSELF


def begin_step(ended: Ended) -> int:
    """Where the next attempt begins without a checkpoint of this run: where this one did, by what its trainer said."""
    return ended.progress.first_step or 0


def exit_code_of(ended: Ended) -> int:
    """As a shell has it: 128 more for a signal; a command that we ended without a signal of its own failed too."""
    if ended.signal is not None:
        return 128 + ended.signal
    if ended.exit_code is not None and ended.exit_code < 0:
        return 128 - ended.exit_code
    code = ended.exit_code if ended.exit_code is not None else 1
    return code or (1 if ended.ended_by is not EndedBy.ITSELF else 0)


def with_reported(settings: Settings, progress: Progress) -> Settings:
    """What the trainer itself said that it runs with goes before what its command seemed to say."""
    said = {
        "micro_batch_size": progress.micro_batch_size,
        "gradient_accumulation_steps": progress.gradient_accumulation_steps,
        "output_dir": progress.output_dir,
        "save_strategy": progress.save_strategy,
    }
    return changed(settings, {name: value for name, value in said.items() if value is not None})


def _one_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[-1].split())[:300] if lines else ""
