"""One call of `Trainer.train`: what is known of it while it runs, told as events."""

from __future__ import annotations

import os
import time
from typing import Any

from autotune.recover.trainer import randomness
from autotune.recover.trainer.events import Events
from autotune.recover.trainer.longest import longest_sample
from autotune.recover.trainer.memory import Peaks, device_total_bytes
from autotune.recover.trainer.plan import Plan
from autotune.recover.trainer.settings import differences, is_checkpointing
from autotune.recover.trainer.stop import StopRequests

FORWARD_BACKWARD, OPTIMIZER = "forward_backward", "optimizer"


class TrainRun:
    """Keeps where the training is, and writes a line a step. Rank 0 writes; every rank keeps."""

    def __init__(
        self, trainer: Any, plan: Plan, events: Events, *, resumed: bool, not_applied: tuple[str, ...]
    ) -> None:
        arguments = trainer.args
        self.trainer, self.plan, self.events = trainer, plan, events
        self.resumed, self.not_applied = resumed, not_applied
        self.writes = bool(arguments.process_index == 0)
        self.stop = StopRequests(
            plan.control, plan.stop_file, rank=arguments.process_index, world_size=arguments.world_size
        )
        self.saves = str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) != "no"
        self.keeps_draws = arguments.world_size == 1 and (self.saves or plan.emergency)
        self.peaks = Peaks(str(arguments.device))
        self.step: int | None = None  # last finished
        self.part: str | None = None
        self.batch: dict[str, int] | None = None  # being worked on
        self.draws: randomness.Draws | None = None  # from which the next step starts
        self.counters: tuple[Any, Any] | None = None  # at the same moment
        self.stopping = False
        self.paused_s = 0.0  # evaluating and saving since the last step's end
        self.saving_s: float | None = None  # the last checkpoint
        self.clock = time.perf_counter
        self._longest: dict[str, int] | None = None
        self._devices = max(1, arguments.n_gpu)  # of torch's DataParallel: each gets its share of a batch
        self._times: list[float] = []
        self._samples = self._tokens = 0
        self._began_s: float | None = None  # the micro batch being worked on
        self._ended_s = time.perf_counter()  # the last step
        self._rate: float | None = None
        self._pending: dict[str, Any] | None = None  # a step's line that waits for its loss

    # --- what the callback and the wrappers tell

    def begins(self, arguments: Any, state: Any) -> None:
        self.step = state.global_step
        if self.writes:
            self.events.write("begin", **self._facts(arguments, state))
        self.peaks.read(now=True)
        self._ended_s, self.paused_s = time.perf_counter(), 0.0

    def epoch_begins(self) -> None:
        if self.keeps_draws:  # a checkpoint at an epoch's end is resumed from before its loader has drawn
            self.draws = randomness.keep()

    def step_begins(self, state: Any) -> None:
        self.counters = (getattr(state, "num_input_tokens_seen", None), getattr(self.trainer, "current_flos", None))
        if self.keeps_draws and not (float(state.epoch or 0).is_integer() and state.global_step and self.draws):
            self.draws = randomness.keep()

    def micro_batch_begins(self, inputs: Any) -> None:
        self.part, self._began_s = FORWARD_BACKWARD, time.perf_counter()
        shape = shape_of(inputs)
        if shape is None:
            self.batch = None
            return
        samples, tokens = -(-shape[0] // self._devices), shape[1]
        self.batch = {"samples": samples, "tokens": tokens}
        if self._longest is None or (tokens, samples) > (self._longest["tokens"], self._longest["samples"]):
            self._longest = self.batch
        self._tokens += samples * tokens
        is_flat = samples == 1 and "position_ids" in inputs  # padding-free: the micro batch in one row
        self._samples += self.trainer.args.per_device_train_batch_size if is_flat else samples

    def micro_batch_ends(self) -> None:
        """Forward, backward, and the trainer's own look at the loss, which waits for the device."""
        if self._began_s is not None:
            self._times.append(time.perf_counter() - self._began_s)
            self._began_s = None

    def optimizer_begins(self, optimizer: Any) -> None:
        self.micro_batch_ends()
        self.part = OPTIMIZER
        if optimizer is not None:
            rate = optimizer.param_groups[0].get("lr")
            self._rate = rate if isinstance(rate, float) else None  # a tensor would have to be waited for

    def step_ends(self, state: Any, *, loss_follows: bool) -> None:
        now = time.perf_counter()
        seconds, self._ended_s = now - self._ended_s - self.paused_s, now
        self.step, self.part, self.batch, self.paused_s = state.global_step, None, None, 0.0
        self.draws = None  # the next step begins after what this one's end draws
        self.peaks.read()
        if self.writes:
            self._pending = {
                "step": self.step,
                "seconds": round(seconds, 6),
                "micro_batches": [round(each, 6) for each in self._times],
                "samples": self._samples,
                "tokens": self._tokens,
                "longest": self._longest,
                "loss": None,
                "learning_rate": self._rate,
                "allocated": self.peaks.allocated,
                "reserved": self.peaks.reserved,
            }
            if not loss_follows:
                self.flush()
        self._times, self._samples, self._tokens = [], 0, 0

    def logged(self, logs: Any) -> None:
        if self._pending is not None and isinstance(logs, dict):
            if isinstance(logs.get("loss"), int | float):
                self._pending["loss"] = logs["loss"]
            self.flush()

    def flush(self) -> None:
        """Write the step's line, with or without its loss."""
        if self._pending is not None:
            line, self._pending = self._pending, None
            self.events.write("step", **line)

    def saved(self, path: str, step: int, seconds: float | None, *, emergency: bool = False) -> None:
        if self.writes:
            self.events.write("saved", path=path, step=step, seconds=seconds, emergency=emergency)

    def pause(self, seconds: float, *, saving: bool) -> None:
        self.paused_s += seconds
        if saving:
            self.saving_s = seconds

    def ends(self, state: Any) -> None:
        self.flush()
        self.step = state.global_step
        if self.writes:
            self.events.write("end", step=self.step, stopped=self.stopping)

    # --- facts

    def _facts(self, arguments: Any, state: Any) -> dict[str, Any]:
        device = str(arguments.device)
        return {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "micro_batch_size": self.trainer._train_batch_size // self._devices,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "world_size": arguments.world_size * self._devices,
            "eval_micro_batch_size": arguments.per_device_eval_batch_size,
            "gradient_checkpointing": is_checkpointing(arguments),
            "output_dir": os.path.abspath(arguments.output_dir),
            "save_strategy": str(getattr(arguments.save_strategy, "value", arguments.save_strategy)),
            "save_steps": arguments.save_steps,
            "save_total_limit": arguments.save_total_limit,
            "dataset_longest": longest_sample(self.trainer.train_dataset),
            "device": device,
            "device_total_bytes": device_total_bytes(device),
            "resumed": self.resumed,
            "differences": differences(self.trainer, self.plan.config),
            "not_applied": list(self.not_applied),
        }


def shape_of(inputs: Any) -> tuple[int, int] | None:
    """(samples, tokens) of a micro batch: its `input_ids`, else the first tensor of two or more dimensions."""
    if not hasattr(inputs, "get"):
        return None
    shape: Any = getattr(inputs.get("input_ids"), "shape", None)
    if shape is None or len(shape) < 2:
        shapes = [tuple(getattr(value, "shape", ())) for value in inputs.values()]
        shape = next((each for each in shapes if len(each) >= 2), None)
    return None if shape is None else (int(shape[0]), int(shape[1]))
