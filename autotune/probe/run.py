"""One probe in the worker: build, warm up, time, and report what was seen, however it ends."""

from __future__ import annotations

import math
import os
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from autotune.probe.channel import Channel
from autotune.probe.memory import DataPeak, lift_data_limit, status_bytes
from autotune.probe.race import is_beaten, is_enough
from autotune.values import Failure, ProbeReport, ProbeRequest, to_json
from autotune.workload.build import BaseModel, build_base
from autotune.workload.step import TrainingStep
from autotune.workload.tracking import LiveBytes, model_tensors

_TRACEBACK_CHARS = 6000
_MESSAGE_CHARS = 4000
_BATCHES_HELD = 2  # on the device and timed in turn
_PROOF_MICRO_BATCHES = 2  # of a proof's optimizer step: the second has gradients alive, as all later ones


def base_key(request: ProbeRequest) -> str:
    """What a kept base model depends on; on CUDA a kept base has its dtypes prepared already."""
    config = request.config
    parts = [request.model.fingerprint, config.quantization, config.double_quant, config.compute_dtype]
    if request.device != "cpu":
        parts += [config.upcast, config.loss]
    return "|".join(str(part) for part in parts)


def build(request: ProbeRequest, channel: Channel) -> BaseModel:
    channel.send({"event": "phase", "name": "build"})
    return build_base(request.model, request.config, torch.device(request.device), seed=request.seed)


def report_of_failure(error: BaseException, phase: str) -> dict[str, Any]:
    """The JSON of a report that holds nothing but how it died."""
    data: dict[str, Any] = to_json(ProbeReport(failure=describe(error, phase)))
    return data


def describe(error: BaseException, phase: str) -> Failure:
    """An exception as facts: its class, its message, and the causes behind it, outermost first."""
    chain: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(chain) < 10:
        chain.append(f"{_class_name(cause)}: {str(cause)[:500]}")
        cause = cause.__cause__ or cause.__context__
    return Failure(
        phase=phase,
        exception=_class_name(error),
        chain=tuple(chain),
        message=str(error)[:_MESSAGE_CHARS],
        traceback="".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:],
    )


def _forget_frames(error: BaseException | None) -> None:
    """Let go of all that an exception and its causes hold: their frames hold the tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _class_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class ProbeRun:
    """Collects facts while it goes, so that a death keeps those seen before it."""

    def __init__(self, request: ProbeRequest, channel: Channel, *, data_before: int) -> None:
        self.request = request
        self.channel = channel
        self.device = torch.device(request.device)
        self.facts: dict[str, Any] = {"phases_s": {}, "pid": os.getpid()}
        self.facts |= {name: getattr(request, name) for name in ("timed_lengths", "tokens_per_sample")}
        self.phase = "start"
        self._phase_began = time.perf_counter()
        self._data_before = data_before
        self._tracker = LiveBytes("cpu") if self.device.type == "cpu" else None
        self._step: TrainingStep | None = None

    def report(self, base: BaseModel | None) -> bool:
        """Run and send the report; True where `base` is bare again and may be used for another probe.

        The worker's outermost frame: any error is a fact.
        """
        failure = None
        reusable = True
        sampler = DataPeak(self._tell_data) if self.device.type == "cpu" else None
        if sampler:
            sampler.start()
        try:
            with tempfile.TemporaryDirectory(prefix="autotune-probe-") as folder:
                self._run(base, folder)
        except BaseException as error:  # noqa: BLE001 - any death is a fact to report
            if sampler:
                sampler.stop()
            lift_data_limit()
            failure = describe(error, self.phase)
            reusable = isinstance(error, torch.OutOfMemoryError) and self._step is not None
            _forget_frames(error)
        self._memory_facts(sampler)
        if self.device.type != "cpu" and reusable:
            reusable = self._bare_again()
        self._step = None
        self._enter("report")
        self.channel.send({"event": "report", "report": to_json(ProbeReport(failure=failure, **self.facts))})
        return reusable

    def _tell_data(self, data_bytes: int) -> None:
        self.channel.send({"event": "memory", "bytes": max(0, data_bytes - self._data_before)})

    def _bare_again(self) -> bool:
        try:
            if self._step is not None:
                self._step.close()
        except RuntimeError:  # the CUDA context is in an error
            return False
        return True

    def _run(self, base: BaseModel | None, folder: str) -> None:
        if self.device.type == "cuda":
            self._enter("context")
            self._limit_cuda()
        if base is None:
            self._enter("build")
            base = build_base(self.request.model, self.request.config, self.device, seed=self.request.seed)
        self._enter("prepare")
        step = TrainingStep(base, self.request.config, folder=folder, seed=self.request.seed)
        self._step = step
        self.facts["unquantized_bytes"] = base.unquantized_bytes
        self.facts["parameters"] = base.parameters
        self.facts["trainable_parameters"] = sum(parameter.numel() for parameter in step.trainable)
        if self._tracker:
            self._tracker.see(model_tensors(step.model))
        self.facts["after_load_bytes"] = self._live_bytes()
        if self.request.proof:
            self._prove(step, folder)
        else:
            self._probe(step)
        self.facts["optimizer_state_bytes"] = step.optimizer_state_bytes
        self.facts["skipped_steps"] = step.skipped_steps

    def _probe(self, step: TrainingStep) -> None:
        """Optimizer state made first, one warm-up micro batch, then the timed ones and an optimizer step.

        The first micro batch shows the memory of all: what is cut short has shown it too.
        """
        self._enter("optimizer")
        step.prime_optimizer()
        if self._tracker:
            self._tracker.see(model_tensors(step.model))
            self._tracker.see(step.optimizer_tensors())
        lengths = self._lengths
        held = lengths if len(lengths) > 1 else lengths * min(self.request.micro_batches, _BATCHES_HELD)
        warm_up, *batches = self._batches(step, (step.config.sequence_length, *held))
        items = step.items_in([warm_up, *batches])
        self._micro(step, warm_up, items, timed=False)
        for number in range(math.ceil(self.request.micro_batches / len(lengths)) * len(lengths)):
            if number and self._may_stop():
                break
            self._timed(step, batches[number % len(batches)], items)
        self._optimizer(step, timed=True)

    @property
    def _lengths(self) -> tuple[int, ...]:
        """What the timed micro batches are padded to, in turn."""
        return self.request.timed_lengths or (self.request.config.sequence_length,)

    def _batches(self, step: TrainingStep, lengths: Sequence[int]) -> list[Any]:
        return step.batches_of(lengths, padded=bool(self.request.timed_lengths))

    def _timed(self, step: TrainingStep, batch: Any, items: Any) -> None:
        if step.config.gradient_accumulation_steps == 1:
            step.model.zero_grad()
        self._micro(step, batch, items, timed=True)

    def _may_stop(self) -> bool:
        """Whether the micro batches timed so far settle it; notes where it is because they cannot win any more."""
        times = self.facts["micro_batch_times_s"]
        self.facts["cut_short"] = is_beaten(times, self.request.beat_s, len(self._lengths))
        return self.facts["cut_short"] or is_enough(times, len(self._lengths))

    def _prove(self, step: TrainingStep, folder: str) -> None:
        """Steps as a trainer takes them. The first is warm-up; on the CPU the second is watched, not timed.

        With lengths of a dataset the last is of full length again: what shorter batches leave behind is in its peak.
        """
        mixed, last = bool(self.request.timed_lengths), self.request.optimizer_steps - 1
        for number in range(self.request.optimizer_steps):
            if mixed and 0 < number < last:
                self._mixed_step(step)
                continue
            watched = self._tracker is not None and number == (last if mixed else 1)
            timed = not mixed and number > (1 if self._tracker else 0)
            self._full_step(step, timed=timed, watched=watched)
        self._enter("evaluate")
        began = time.perf_counter()
        with self._tracker or nullcontext():
            step.evaluate(padded=mixed)
        self._synchronise()
        self.facts["eval_time_s"] = time.perf_counter() - began
        self._enter("checkpoint")
        step.save(folder)

    def _full_step(self, step: TrainingStep, *, timed: bool, watched: bool) -> None:
        """An optimizer step of micro batches of full length: two show the memory of more."""
        count = min(step.config.gradient_accumulation_steps, self.request.micro_batches, _PROOF_MICRO_BATCHES)
        batches = self._batches(step, (step.config.sequence_length,) * count)
        items = step.items_in(batches)
        if watched and self._tracker:
            self._tracker.see(model_tensors(step.model))
            self._tracker.see(step.optimizer_tensors())
        for batch in batches:
            self._micro(step, batch, items, timed=timed, watched=watched)
        self._optimizer(step, timed=timed)

    def _mixed_step(self, step: TrainingStep) -> None:
        """An optimizer step of one timed micro batch of each length."""
        batches = self._batches(step, self._lengths)
        items = step.items_in(batches)
        for batch in batches:
            self._timed(step, batch, items)
        self._optimizer(step, timed=True)

    def _micro(self, step: TrainingStep, batch: Any, items: Any, *, timed: bool, watched: bool | None = None) -> None:
        watched = not timed if watched is None else watched
        with self._watching() if watched else nullcontext():
            began = time.perf_counter()
            loss = step.micro_batch(batch, items, phase=self._enter)
            self._synchronise()
            taken = time.perf_counter() - began
        if timed:
            self._append("micro_batch_times_s", taken)
        self.facts["loss"] = float(loss) if math.isfinite(float(loss)) else None
        if self.facts["loss"] is not None:
            self._append("losses", self.facts["loss"])

    def _optimizer(self, step: TrainingStep, *, timed: bool) -> None:
        self._enter("optimizer")
        began = time.perf_counter()
        step.optimizer_step()
        self._synchronise()
        if timed:
            self._append("optimizer_times_s", time.perf_counter() - began)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with self._tracker or nullcontext():
            yield

    def _append(self, name: str, value: float) -> None:
        self.facts[name] = (*self.facts.get(name, ()), value)

    def _enter(self, phase: str) -> None:
        """Note the time of the phase that ends, and tell the parent of the one that begins."""
        now = time.perf_counter()
        times = self.facts["phases_s"]
        times[self.phase] = times.get(self.phase, 0.0) + now - self._phase_began
        self.phase, self._phase_began = phase, now
        self.channel.send({"event": "phase", "name": phase})

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _live_bytes(self) -> int:
        return self._tracker.live_bytes if self._tracker else torch.cuda.memory_allocated(self.device)

    def _memory_facts(self, sampler: DataPeak | None) -> None:
        """Peaks so far. Called at the end, and on death."""
        if self._tracker:
            if self._tracker.peak_bytes:
                self.facts["peak_allocated_bytes"] = self._tracker.peak_bytes
            if sampler:
                self.facts["peak_reserved_bytes"] = max(0, sampler.finish() - self._data_before)
            self.facts["device_used_bytes"] = status_bytes("VmHWM")
            if self.request.memory_limit_bytes is not None:
                self.facts["limit_bytes"] = self.request.memory_limit_bytes - self.request.headroom_bytes
        elif "peak_allocated_bytes" not in self.facts and torch.cuda.is_initialized():
            self.facts["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
            self.facts["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            self.facts["device_free_bytes"] = free
            self.facts["device_used_bytes"] = total - free

    def _limit_cuda(self) -> None:
        """The allocator may hold the limit less headroom, less this process's context; others' memory is not ours."""
        torch.cuda.set_device(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        torch.zeros(1, device=self.device)  # the context exists from here on
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        before = self.request.device_used_before_bytes
        context = max(0, total - free - held - before) if before is not None else 0
        card = self.request.memory_limit_bytes
        room = card - context if card is not None else free + held
        limit = max(0, room - self.request.headroom_bytes)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
        self.facts["limit_bytes"] = limit
