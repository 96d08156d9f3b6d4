"""Fakes for the protocols: an executor with a made-up memory and speed law, a store in memory, devices of any size."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from autotune.errors import Interrupted
from autotune.probe.race import is_beaten, is_enough
from autotune.search.climb import Observation
from autotune.values import (
    GIB,
    MIB,
    Attention,
    Device,
    Environment,
    Failure,
    FitRequest,
    Isolation,
    LossPath,
    ModelSource,
    Prediction,
    Preserves,
    ProbeReport,
    ProbeRequest,
    TrainingConfig,
    TrialRecord,
    Upcast,
)
from benchmarks.memory_store import MemoryStore as MemoryStore  # one store in memory, for replays and tests

#: SmolLM2-135M's shape (its config.json on the Hugging Face hub).
SMALL_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def a_model(name: str = "small-llama", **changes: Any) -> ModelSource:
    """A small Llama; `changes` go into its config."""
    return ModelSource(name=name, config={**SMALL_LLAMA, **changes})


def a_request(**changes: Any) -> FitRequest:
    """256 tokens, effective batch 8, length stated. `changes` name fields of FitRequest or of its start config."""
    mine = {item.name for item in fields(FitRequest)}
    start = TrainingConfig(
        **{
            "sequence_length": 256,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 8,
            **{name: value for name, value in changes.items() if name not in mine},
        }
    )
    defaults: dict[str, Any] = {"model": a_model(), "start": start, "sequence_length_stated": True}
    return FitRequest(**{**defaults, **{name: value for name, value in changes.items() if name in mine}})


def a_gpu(total_gib: float = 12, name: str = "NVIDIA GeForce RTX 3060", **changes: Any) -> Device:
    """An idle NVIDIA card."""
    total = round(total_gib * GIB)
    defaults: dict[str, Any] = {
        "kind": "cuda",
        "index": 0,
        "name": name,
        "total_bytes": total,
        "free_bytes": total,
        "compute_capability": "8.6",
        "driver": "580.65.06",
        "runtime": "13.0",
    }
    return Device(**{**defaults, **changes})


def a_cpu(total_gib: float = 16, name: str = "Test CPU", **changes: Any) -> Device:
    """The rehearsal target."""
    total = round(total_gib * GIB)
    return Device(**{"kind": "cpu", "index": None, "name": name, "total_bytes": total, "free_bytes": total, **changes})


def an_environment(**changes: Any) -> Environment:
    """Versions of a machine that has everything but trl."""
    defaults: dict[str, Any] = {
        "driver": None,
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "bitsandbytes": "0.50.2",
        "accelerate": "1.15.0",
        "trl": None,
        "python": "3.11.9",
        "os": "Linux",
        "threads": 2,
        "autotune": "0.1.0",
    }
    return Environment(**{**defaults, **changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Made-up memory and speed of a training step, monotone in each setting. The defaults suit 1,500 MiB."""

    weights_bytes: int = 120 * MIB  # 4-bit base, adapters, optimizer
    unquantized_bytes: int = 60 * MIB  # embedding and head in 16 bits: twice this when upcast
    activation_bytes_per_token: int = 900_000  # every layer kept
    logits_bytes_per_token: int = 600_000
    full_checkpointing_keeps: float = 0.15  # of the activations
    chunked_loss_keeps: float = 0.1  # of the logits
    tokens_per_second: float = 1000.0  # of endless micro batches, nothing recomputed
    half_speed_tokens: int = 200  # tokens of a micro batch that runs at half of that
    full_checkpointing_speed: float = 0.75
    chunked_loss_speed: float = 0.97
    upcast_speed: float = 0.95
    flash_speed: float = 1.1
    optimizer_time_s: float = 0.0

    def peak_bytes(self, config: TrainingConfig) -> int:
        tokens = config.micro_batch_size * config.sequence_length
        head = self.unquantized_bytes * {Upcast.FP32: 2.0, Upcast.NORMS: 1.01, Upcast.NONE: 1.0}[config.upcast]
        logits = self.logits_bytes_per_token * (1.0 if config.loss is LossPath.FULL else self.chunked_loss_keeps)
        layers = self.activation_bytes_per_token * self._kept(config.gradient_checkpointing)
        if config.attention is Attention.EAGER:
            layers *= 1.5
        return round(self.weights_bytes * (1 if config.double_quant else 1.05) + head + tokens * (logits + layers))

    def speed(self, config: TrainingConfig) -> float:
        """Tokens per second of micro batches, the optimizer's time left out."""
        tokens = config.micro_batch_size * config.sequence_length
        speed = self.tokens_per_second * tokens / (tokens + self.half_speed_tokens)
        speed *= 1 - (1 - self.full_checkpointing_speed) * self._recomputed(config.gradient_checkpointing)
        speed *= {Attention.EAGER: 0.8, Attention.SDPA: 1.0, Attention.FLASH_ATTENTION_2: self.flash_speed}[
            config.attention
        ]
        speed *= 1.0 if config.loss is LossPath.FULL else self.chunked_loss_speed
        return speed * (self.upcast_speed if config.upcast is Upcast.FP32 else 1.0)

    def micro_batch_s(self, config: TrainingConfig) -> float:
        return config.micro_batch_size * config.sequence_length / self.speed(config)

    def _kept(self, checkpointing: str) -> float:
        if checkpointing == "offload":
            return self.full_checkpointing_keeps / 2
        return 1 - (1 - self.full_checkpointing_keeps) * self._recomputed(checkpointing)

    def _recomputed(self, checkpointing: str) -> float:
        """Share of the layers that are run again in the backward; offload pays 1.2 for its copies."""
        if checkpointing.startswith("every_"):
            return 1 / int(checkpointing.removeprefix("every_"))
        return {"off": 0.0, "full": 1.0, "offload": 1.2}[checkpointing]


def observe(law: Law, config: TrainingConfig, limit_bytes: int) -> Observation:
    """What a search sees of a probe of `config` under `law`."""
    peak = law.peak_bytes(config)
    fits = peak <= limit_bytes
    if not fits:
        return Observation(config, fits=False, out_of_memory=True, tokens_per_second=None, spread=None, peak_bytes=None)
    micro_s = law.micro_batch_s(config)
    return Observation(
        config=config,
        fits=True,
        out_of_memory=False,
        tokens_per_second=law.speed(config),
        spread=0.0,
        peak_bytes=peak,
        step_time_s=micro_s * config.gradient_accumulation_steps,
        times_s=(micro_s,) * 6,
        start_s=0.5,
    )


@dataclass(slots=True)
class FakeExecutor:
    """A ProbeExecutor under `law`: the same config always gives the same report. Counts what it ran."""

    law: Law = field(default_factory=Law)
    noise: float = 0.0  # times vary by up to this fraction, by config and seed
    seed: int = 0
    failure: Callable[[ProbeRequest], Failure | None] | None = None  # a death of another kind, asked first
    interrupt_after: int | None = None  # probes; the next one raises Interrupted
    requests: list[ProbeRequest] = field(default_factory=list)
    out_of_memory: int = 0
    closed: bool = False

    @property
    def probes(self) -> int:
        return len(self.requests)

    def probe(self, request: ProbeRequest, *, fresh: bool = False) -> ProbeReport:
        if self.interrupt_after is not None and self.probes >= self.interrupt_after:
            raise Interrupted("stopped by the test")
        self.requests.append(request)
        isolation = Isolation.FRESH if fresh else Isolation.WARM
        failure = (self.failure and self.failure(request)) or self._out_of_memory(request)
        if failure is not None:
            return replace(self._failed(request, failure), isolation=isolation)
        return replace(self._finished(request), isolation=isolation)

    def environment(self) -> Environment:
        return an_environment()

    def close(self) -> None:
        self.closed = True

    def _out_of_memory(self, request: ProbeRequest) -> Failure | None:
        limit = _allowed_bytes(request)
        peak = self.law.peak_bytes(request.config)
        if limit is None or peak <= limit:
            return None
        self.out_of_memory += 1
        tried = max(512, peak - limit)
        return _cpu_failure(tried) if request.device == "cpu" else _cuda_failure(tried, limit)

    def _failed(self, request: ProbeRequest, failure: Failure) -> ProbeReport:
        return ProbeReport(
            phases_s={"build": 0.3, failure.phase: 0.2},
            after_load_bytes=self.law.weights_bytes,
            limit_bytes=_allowed_bytes(request),
            device_free_bytes=0,
            failure=failure,
            exit_code=0,
            wall_time_s=0.5,
            startup_s=0.3,
        )

    def _finished(self, request: ProbeRequest) -> ProbeReport:
        config, peak = request.config, self.law.peak_bytes(request.config)
        chance = random.Random(f"{self.seed}|{config}")
        noise = 1 + self.noise * chance.uniform(-1, 1)
        by_length = [self.law.micro_batch_s(replace(config, sequence_length=n)) * noise for n in _lengths(request)]
        micro_s = sum(by_length) / len(by_length)
        untimed = (2 if request.device == "cpu" or request.timed_lengths else 1) if request.proof else 0
        steps = max(1, request.optimizer_steps - untimed)
        timed, beaten = _timed(by_length, request)
        batches = len(timed) * request.optimizer_steps
        losses = tuple(11.0 - 0.01 * batch for batch in range(batches))
        return ProbeReport(
            phases_s={"build": 0.3, "forward": micro_s * batches},
            micro_batch_times_s=timed * steps,
            timed_lengths=request.timed_lengths,
            tokens_per_sample=request.tokens_per_sample,
            optimizer_times_s=(self.law.optimizer_time_s,) * steps,
            cut_short=beaten,
            eval_time_s=micro_s / 3 if request.proof else None,
            loss=losses[-1],
            losses=losses,
            optimizer_state_bytes=self.law.weights_bytes // 10,
            after_load_bytes=self.law.weights_bytes,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=round(peak * 1.02),
            limit_bytes=_allowed_bytes(request),
            exit_code=0,
            wall_time_s=0.3 + micro_s * batches,
            startup_s=0.3,
        )


@dataclass(slots=True)
class FakePredictor:
    """A Predictor that knows `law` but for its errors, and learns them from trials as a real one does.

    What it allows is what the executor's limit is compared with: tensors, and nothing beside them.
    """

    law: Law = field(default_factory=Law)
    allowed_bytes: int | None = None
    memory_error: float = 1.0  # expected ÷ true bytes
    time_error: float = 1.0  # expected ÷ true seconds
    is_known: Callable[[TrainingConfig], bool] = lambda config: True  # a trace is at hand
    is_traceable: Callable[[TrainingConfig], bool] = lambda config: True
    learned: list[TrialRecord] = field(default_factory=list)
    asked: list[TrainingConfig] = field(default_factory=list)  # whose memory was predicted, by `predict` or `expect`

    def predict(self, config: TrainingConfig) -> Prediction | None:
        self.asked.append(config)
        return self._prediction(config, self._factor(_memory_ratio), self._factor(_time_ratio))

    def hopeless(self, config: TrainingConfig) -> bool:
        found = self.predict(config)
        if found is None or self.allowed_bytes is None:
            return False
        return found.peak_allocated_bytes * 0.99 > self.allowed_bytes

    def learn(self, trial: TrialRecord) -> None:
        self.learned.append(trial)

    def prepare(self, configs: Iterable[TrainingConfig]) -> None:
        """There is nothing to make."""

    def at_hand(self, config: TrainingConfig) -> bool:
        return self.is_known(config)

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        if not self.is_traceable(config):
            return None
        micro_s = config.micro_batch_size * config.sequence_length / self.law.speed(config)
        in_micro_batches = config.gradient_accumulation_steps * micro_s * self.time_error
        return {
            "layers": 0.8 * in_micro_batches,
            "logits": 0.2 * in_micro_batches,
            "optimizer": self.law.optimizer_time_s * self.time_error,
        }

    def expect(self, config: TrainingConfig) -> Prediction | None:
        self.asked.append(config)
        return self._prediction(config, 1.0, 1.0)

    def _prediction(self, config: TrainingConfig, memory_factor: float, time_factor: float) -> Prediction | None:
        seconds = self.seconds(config)
        if seconds is None:
            return None
        peak = round(self.law.peak_bytes(config) * self.memory_error * memory_factor)
        return Prediction(
            peak_allocated_bytes=peak,
            peak_reserved_bytes=peak,
            device_used_bytes=peak,
            training_peak_allocated_bytes=peak,
            step_time_s=sum(seconds.values()) * time_factor,
            memory_factor=memory_factor,
            time_factor=time_factor,
            seconds_by_kind=dict(seconds),
        )

    def _factor(self, ratio: Callable[[TrialRecord, Prediction], float | None]) -> float:
        """The median of measured ÷ expected."""
        pairs = [(trial, self._prediction(trial.config, 1.0, 1.0)) for trial in self.learned]
        ratios = [found for trial, expected in pairs if expected and (found := ratio(trial, expected)) is not None]
        return statistics.median(ratios) if ratios else 1.0


def _memory_ratio(trial: TrialRecord, expected: Prediction) -> float | None:
    peak = trial.report.peak_allocated_bytes
    return peak / expected.peak_allocated_bytes if peak else None


def _time_ratio(trial: TrialRecord, expected: Prediction) -> float | None:
    step_s = trial.report.step_time_s(trial.config.gradient_accumulation_steps)
    return step_s / expected.step_time_s if step_s and expected.step_time_s else None


@dataclass(frozen=True, slots=True)
class FakeStrategy:
    """A Strategy that makes `change` of a config, or nothing where that gives None."""

    name: str
    preserves: Preserves
    change: Callable[[TrainingConfig, FitRequest], TrainingConfig | None]

    def apply(self, config: TrainingConfig, request: FitRequest, device: Device) -> TrainingConfig | None:
        return self.change(config, request)


def _steps(field_name: str, *values: Any) -> Callable[[TrainingConfig, FitRequest], TrainingConfig | None]:
    """From each of `values` to the next one; nothing from the last or from another value."""

    def change(config: TrainingConfig, request: FitRequest) -> TrainingConfig | None:
        following = dict(itertools.pairwise(values))
        value = following.get(getattr(config, field_name))
        return None if value is None else replace(config, **{field_name: value})

    return change


def _halve_sequence(config: TrainingConfig, request: FitRequest) -> TrainingConfig | None:
    shortest = request.min_sequence_length or (request.start.sequence_length if request.sequence_length_stated else 64)
    half = config.sequence_length // 2
    return replace(config, sequence_length=half) if half >= shortest else None


def _halve_micro_batch(config: TrainingConfig, request: FitRequest) -> TrainingConfig | None:
    if config.micro_batch_size % 2:
        return None
    return replace(
        config,
        micro_batch_size=config.micro_batch_size // 2,
        gradient_accumulation_steps=config.gradient_accumulation_steps * 2,
    )


#: Enough of a ladder to search with.
SMALL_LADDER = (
    FakeStrategy("chunked_loss", Preserves.EXACT, _steps("loss", LossPath.FULL, LossPath.CHUNKED)),
    FakeStrategy("no_fp32_copies", Preserves.EXACT, _steps("upcast", Upcast.FP32, Upcast.NONE)),
    FakeStrategy("smaller_micro_batch", Preserves.EXACT, _halve_micro_batch),
    FakeStrategy("checkpointing", Preserves.EXACT, _steps("gradient_checkpointing", "off", "every_2", "full")),
    FakeStrategy("shorter_sequence", Preserves.CONSENT, _halve_sequence),
)


@dataclass(frozen=True, slots=True)
class FakeReader:
    """A DeviceReader that finds what it is given."""

    found: Sequence[Device] = ()

    def devices(self) -> Iterable[Device]:
        return self.found


def _lengths(request: ProbeRequest) -> tuple[int, ...]:
    return request.timed_lengths or (request.config.sequence_length,)


def _timed(by_length: Sequence[float], request: ProbeRequest) -> tuple[tuple[float, ...], bool]:
    """The micro batches that a worker times to an optimizer step, and whether it stops because they are beaten."""
    count = len(by_length)
    if request.proof:
        return (*by_length,) * (1 if request.timed_lengths else min(2, request.micro_batches)), False
    times = (*by_length,)
    while len(times) < request.micro_batches and not is_enough(times, count):
        if is_beaten(times, request.beat_s, count):
            return times, True
        times = (*times, *by_length)
    return times, False


def _allowed_bytes(request: ProbeRequest) -> int | None:
    """What the tensors of a probe may take; None: no limit."""
    if request.memory_limit_bytes is None:
        return None
    return request.memory_limit_bytes - request.headroom_bytes


def _cpu_failure(tried: int) -> Failure:
    """As torch 2.13 on Linux words it."""
    message = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory:"
        f" you tried to allocate {tried} bytes. Error code 12 (Cannot allocate memory)"
    )
    return Failure(phase="forward", exception="RuntimeError", chain=(f"RuntimeError: {message}",), message=message)


def _cuda_failure(tried: int, limit: int) -> Failure:
    """As torch 2.9 words it."""
    message = (
        f"CUDA out of memory. Tried to allocate {tried / MIB:.2f} MiB. GPU 0 has a total capacity of"
        f" {limit / GIB:.2f} GiB of which 0 bytes is free. Including non-PyTorch memory, this process has"
        f" {limit / GIB:.2f} GiB memory in use. Of the allocated memory {limit / GIB * 0.95:.2f} GiB is allocated by"
        " PyTorch, and 64.00 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large"
        " try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    )
    return Failure(
        phase="forward",
        exception="torch.OutOfMemoryError",
        chain=(f"torch.OutOfMemoryError: {message}",),
        message=message,
    )
