"""The vocabulary of a long run: what its command says, what is launched, how an attempt ended, what is done about it.

TrainingCommand → Launch → Ended → Judgement → Decision → Incident → next Launch
  (as given)     (attempt)  (facts) (verdict)   (action)   (kept)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from autotune.values import Judgement

PLAN_SCHEMA = "autotune.plan/1"
PLAN_VARIABLE = "AUTOTUNE_PLAN"  # in a trainer's environment: path of the plan that it runs under


class Phase(StrEnum):
    """Where in a training program something happens."""

    START = "start"  # the process is up; nothing of the training is
    LOAD = "load"  # model, data and trainer are made; a checkpoint is loaded
    TRAIN = "train"
    EVALUATE = "evaluate"
    SAVE = "save"
    DONE = "done"  # training has ended; what the script does after it


class Action(StrEnum):
    """What is done about the end of an attempt."""

    FINISH = "finish"  # it ended well
    STEP_DOWN = "step_down"  # resume with a config that is expected to fit
    SMALLER_EVALUATION = "smaller_evaluation"  # resume with another evaluation batch, training left alone
    SPARE_HOST = "spare_host"  # resume with fewer data-loader workers or without offloading
    SAME_AGAIN = "same_again"  # resume with the same config
    WAIT = "wait"  # resume with the same config once the memory is free
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a training command says of its run, in the names of `TrainingConfig`. None: it does not say."""

    trainer: str | None = None  # "transformers", "trl", "axolotl", "llamafactory"
    model: str | None = None  # an id, or a folder
    output_dir: str | None = None
    sequence_length: int | None = None
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    eval_micro_batch_size: int | None = None
    gradient_checkpointing: str | None = None  # off | full | offload | every_N
    optimizer: str | None = None
    attention: str | None = None
    quantization: str | None = None  # nf4 | none
    double_quant: bool | None = None
    compute_dtype: str | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    target_modules: tuple[str, ...] | None = None
    packing: bool | None = None
    save_strategy: str | None = None  # no | steps | epoch | best
    save_steps: float | None = None
    dataloader_workers: int | None = None
    resume_from_checkpoint: str | None = None  # as the user gave it


#: What a command may be told to run with: fields of `Settings`, and "allocator" (which the environment carries).
Change = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One attempt, ready to start."""

    argv: tuple[str, ...]
    environ: dict[str, str]  # to be added to the run's environment
    shown: tuple[str, ...] = ()  # what differs from the command as given, a line each


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Shape of one micro batch."""

    samples: int
    tokens: int  # of its longest sample, padding counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What an attempt's trainer has reported so far. Steps are the trainer's global optimizer steps."""

    reporting: bool = False  # whether anything was ever reported
    phase: Phase = Phase.START
    first_step: int | None = None  # where this attempt began: 0, or the checkpoint's step
    step: int | None = None  # last finished
    max_steps: int | None = None
    steps: int = 0  # finished in this attempt
    micro_batch_size: int | None = None  # as the trainer itself says it runs
    gradient_accumulation_steps: int | None = None
    world_size: int | None = None
    eval_micro_batch_size: int | None = None  # as it says, too
    gradient_checkpointing: bool | None = None
    step_time_s: float | None = None  # median of the newest 50
    micro_batch_times_s: tuple[float, ...] = ()  # newest, forward and backward
    tokens_per_second: float | None = None  # of the newest steps, padding counted
    loss: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_total_bytes: int | None = None
    longest_seen: Batch | None = None  # the micro batch with most tokens a sample that has passed
    dataset_longest: int | None = None  # tokens of the longest sample, where the dataset tells at once
    output_dir: str | None = None
    save_strategy: str | None = None
    checkpoint: str | None = None  # last one that the trainer said was written
    checkpoint_step: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    updated_at: float | None = None  # `time.time()` of the newest report


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """What the dying trainer itself said: the first rank's to die. None fields: it did not say."""

    rank: int | None = None
    exception: str | None = None  # fully qualified class
    message: str = ""
    traceback: str = ""
    phase: Phase | None = None
    batch: Batch | None = None  # the micro batch being worked on
    step: int | None = None  # last finished
    part: str | None = None  # within a training step: "forward_backward", "optimizer", None elsewhere
    saved: str | None = None  # checkpoint that was still written


class EndedBy(StrEnum):
    """Who ended an attempt."""

    ITSELF = "itself"
    STALL = "stall"  # we did: no progress for too long
    START_LIMIT = "start_limit"  # we did: no first step for too long
    RANK = "rank"  # we did: another rank had died
    SPILL = "spill"  # we did: device memory lay in system RAM
    USER = "user"  # Ctrl-C, SIGTERM or a cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one attempt ended: facts only."""

    exit_code: int | None  # of the command, as the system has it; None: it could not be started
    signal: int | None = None
    ended_by: EndedBy = EndedBy.ITSELF
    progress: Progress = field(default_factory=Progress)
    death: Death | None = None
    tail: str = ""  # end of its output
    pid: int | None = None
    wall_time_s: float = 0.0
    peak_rss_bytes: int | None = None
    free_before_bytes: int | None = None  # on the card before it started
    free_after_bytes: int | None = None  # after it was gone
    tenants_bytes: int | None = None  # of other processes on the card at its end
    notes: tuple[str, ...] = ()  # what was noticed on the way: a throughput collapse, memory near the limit

    @property
    def phase(self) -> Phase:
        return (self.death.phase if self.death and self.death.phase else None) or self.progress.phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The one action, with its reason."""

    action: Action
    why: str
    change: dict[str, Any] = field(default_factory=dict)  # settings of the next attempt that differ from this one's
    wait_s: float = 0.0  # before the next attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One end that was not the good one: what died, the evidence, what was changed, what it cost, what was lost."""

    run_id: str
    number: int  # from 1, within the run
    attempt: int  # from 1
    time_utc: str
    judgement: Judgement
    phase: Phase
    ended_by: EndedBy
    exit_code: int | None
    signal: int | None
    step: int | None  # last finished
    batch: Batch | None  # being worked on
    decision: Decision
    resumed_from: str | None = None  # checkpoint of the next attempt; None: from the start, or none followed
    steps_lost: int | None = None  # finished, and to be done again; None: not known
    seconds_lost: float | None = None  # of training that is done again
    message: str = ""  # what the trainer said last, in a line


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder that a run can resume from."""

    path: Path
    step: int
