"""One row of the queue: a training command, what is asked of its run, and how far that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from autotune.recover.identity import ProcessId


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    INTERRUPTED = "interrupted"  # its supervisor was ended from outside: it resumes before others start
    FITTING = "fitting"
    RUNNING = "running"
    RECOVERING = "recovering"
    WAITING = "waiting"  # for memory that another process holds
    CANCELLING = "cancelling"  # asked for; its supervisor has not ended yet
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: A supervisor has the job.
LIVE = (State.FITTING, State.RUNNING, State.RECOVERING, State.WAITING, State.CANCELLING)
#: Waits for one.
QUEUED = (State.QUEUED, State.INTERRUPTED)
#: Nothing more happens to it.
ENDED = (State.FINISHED, State.FAILED, State.CANCELLED)


class Waiting(NamedTuple):
    """What of a queued job decides where it starts."""

    id: int
    gpu: str
    message: str


class Event(StrEnum):
    """What a hook can be told of."""

    FINISHED = "finished"
    RECOVERED = "recovered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What is submitted. Words are never given to a shell; secrets are in none of them."""

    command: tuple[str, ...]
    cwd: str
    name: str = ""
    options: tuple[str, ...] = ()  # of `autotune run`, as words
    environ: dict[str, str] = field(default_factory=dict)  # to be added to the supervisor's environment
    hooks: dict[str, tuple[str, ...]] = field(default_factory=dict)  # event → words of a command
    gpu: str = "auto"  # as asked: auto, all, cpu, cuda:N, a UUID or a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A row. Times are UTC, ISO 8601."""

    id: int
    kind: str  # "job": the daemon's to start; "run": an `autotune run` of its own
    state: State
    device: str | None = None  # where it runs or ran last
    submitted_utc: str
    started_utc: str | None = None  # of the newest supervisor
    ended_utc: str | None = None
    updated_utc: str | None = None  # of the newest report
    exit_code: int | None = None  # of the command
    supervisor: ProcessId | None = None
    run_folder: str | None = None
    attempts: int = 0  # of the command
    restarts: int = 0  # supervisors that died one after the other without progress
    step_at_start: int | None = None  # `step` when the newest supervisor was started
    phase: str | None = None
    step: int | None = None
    max_steps: int | None = None
    tokens_per_second: float | None = None
    step_time_s: float | None = None
    loss: float | None = None
    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    message: str = ""  # the newest word about it

    @property
    def label(self) -> str:
        """ "job 3 (llama-sft)"."""
        return f"job {self.id}" + (f" ({self.name})" if self.name else "")

    @property
    def attempt_folders(self) -> list[Path]:
        """Where each attempt wrote about its processes, so that what outlives a supervisor is found."""
        return sorted(Path(self.run_folder).glob("attempt-*")) if self.run_folder else []

    def option(self, name: str, otherwise: str) -> str:
        """The value that follows `--name` in its options."""
        word = f"--{name}"
        return self.options[self.options.index(word) + 1] if word in self.options[:-1] else otherwise
