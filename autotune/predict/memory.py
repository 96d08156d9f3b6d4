"""A trace to peak memory: the whole run's allocations through the allocator's simulator."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

from autotune.predict.allocator import CachingAllocator
from autotune.predict.kernels import KernelSet
from autotune.predict.trace import Expansion, NotAlike, Trace
from autotune.values import AllocatorSetting, Quantization, TrainingConfig

ROUNDING = 512
WARM_UP_LEAVES = 1_288_490_188  # 1.2 GiB free: transformers' caching_allocator_warmup


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Predicted bytes of one config. `parts` are what lives at the peak and sum to `peak_allocated_bytes`."""

    after_load_bytes: int
    forward_peak_allocated_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    training_peak_allocated_bytes: int  # without the evaluation
    evaluation_peak_allocated_bytes: int | None  # None: of that batch size nothing was traced
    checkpoint_peak_allocated_bytes: int = 0  # while one is written: tensors go to the host one by one, copied there
    parts: dict[str, int] = field(default_factory=dict)
    paged_bytes: int = 0
    unquantized_bytes: int = 0  # of the base weights, experts that bitsandbytes leaves in 16 bits
    alloc_retries: int = 0  # times that the allocator had to give its cache back: each costs a step some time


def rounded(size: int) -> int:
    """As the allocator counts a request."""
    return max(ROUNDING, -(-size // ROUNDING) * ROUNDING)


def forecast_memory(
    trace: Trace,
    config: TrainingConfig,
    kernels: KernelSet,
    *,
    limit_bytes: int | None = None,
    evaluation: Trace | None = None,
) -> MemoryForecast:
    """Memory of a run with `config`, whose B and T belong to the trace's class: loading, two optimizer steps, an
    evaluation. `limit_bytes`: what the allocator may reserve. `evaluation`: a trace for the evaluation's batch size,
    where it is another than the training's. Raises `OutOfMemory` where the limit is too little.

    Source of the order: what a Trainer does; of the numbers: the trace. The last few answers are kept.
    """
    return _forecast(_ById(trace), config, kernels, limit_bytes, _ById(evaluation or trace))


class _ById:
    """A trace as the key of a cache: itself, not its content."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def __hash__(self) -> int:
        return id(self.trace)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.trace is self.trace


@functools.lru_cache(maxsize=256)
def _forecast(
    training: _ById, config: TrainingConfig, kernels: KernelSet, limit_bytes: int | None, evaluation: _ById
) -> MemoryForecast:
    return _Run(training.trace, config, kernels, limit_bytes, evaluation.trace).forecast()


class _Run:
    """One run in the simulator; `residents` says what lives besides the program at hand, by part."""

    def __init__(
        self,
        trace: Trace,
        config: TrainingConfig,
        kernels: KernelSet,
        limit_bytes: int | None,
        evaluation: Trace | None = None,
    ) -> None:
        self.evaluation = evaluation or trace
        self.trace, self.config, self.kernels, self.limit_bytes = trace, config, kernels, limit_bytes
        self.allocator = CachingAllocator(
            limit_bytes=limit_bytes,
            expandable_segments=config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS,
        )
        self.slot = 0
        self.residents: Counter[str] = Counter()
        self.peak = self.peak_reserved = self.forward_peak = self.program_peak = 0
        self.peak_at: tuple[Expansion, int, Counter[str]] | None = None

    def forecast(self) -> MemoryForecast:
        self._load()
        after_load = self.allocator.allocated_bytes
        self._keep("library workspaces", 2 * [self.kernels.cublas_workspace_bytes])  # forward's thread, and backward's
        batch, tokens = self.config.micro_batch_size, self.config.sequence_length
        self._optimizer(0, self._run(self.trace.expand("first", batch, tokens, self.slot)))
        gradients = self._run(self.trace.expand("first", batch, tokens, self.slot))
        forward_peak = self.forward_peak
        if self.config.gradient_accumulation_steps > 1:
            size = self._gradient_bytes()
            self.residents["gradients"] += size
            self._run(self.trace.expand("next", batch, tokens, self.slot))
            self.residents["gradients"] -= size
            forward_peak = max(forward_peak, self.forward_peak)
        self._optimizer(1, gradients)
        between_steps, training_peak = self.allocator.allocated_bytes, self.peak
        evaluation = self._evaluate(self.config.eval_micro_batch_size or batch, tokens)
        return MemoryForecast(
            after_load_bytes=after_load,
            forward_peak_allocated_bytes=forward_peak,
            peak_allocated_bytes=self.peak,
            peak_reserved_bytes=self.peak_reserved,
            training_peak_allocated_bytes=training_peak,
            evaluation_peak_allocated_bytes=evaluation,
            checkpoint_peak_allocated_bytes=between_steps,
            parts=self._parts_at_peak(),
            paged_bytes=self.trace.paged_bytes,
            unquantized_bytes=self.trace.unquantized_bytes,
            alloc_retries=self.allocator.num_alloc_retries,
        )

    def _replay(self, events: list[int]) -> None:
        self.allocator.replay(events)
        self.slot += sum(1 for event in events if event >= 0)

    def _keep(self, part: str, sizes: list[int]) -> None:
        sizes = [size for size in sizes if size]
        self._replay(sizes)
        self.residents[part] += sum(rounded(size) for size in sizes)

    def _load(self) -> None:
        """As from_pretrained does onto a device, where it quantises: one warm-up block, then tensor by tensor; then
        dtypes. What is not quantised is loaded on the host and moved, tensor by tensor."""
        base = [r for r in self.trace.residents if r.part != "adapters"]
        if self.kernels.kind == "cuda" and self.config.quantization is not Quantization.NONE:
            warm_up = sum(r.before_bytes or r.size_bytes for r in base)
            if self.limit_bytes is not None:
                warm_up = min(warm_up, max(0, self.limit_bytes - WARM_UP_LEAVES))
            self._replay([warm_up, ~self.slot])
        replaced: list[tuple[int, int]] = []  # (slot, final bytes)
        for resident in base:
            if resident.load_bytes:
                self._replay([resident.load_bytes, resident.size_bytes, ~self.slot])
            else:
                if resident.before_bytes:
                    replaced.append((self.slot, resident.size_bytes))
                self._replay([resident.before_bytes or resident.size_bytes])
            self.residents[resident.part] += rounded(resident.size_bytes)
        for slot, size in replaced:
            self._replay([size, ~slot])
        self._keep("adapters", [r.size_bytes for r in self.trace.residents if r.part == "adapters"])
        self.peak_reserved = self.allocator.peak_reserved_bytes

    def _evaluate(self, batch: int, tokens: int) -> int | None:
        try:
            expansion = self.evaluation.expand("evaluate", batch, tokens, self.slot)
        except NotAlike:
            return None
        self._run(expansion)
        return self.program_peak

    def _run(self, expansion: Expansion) -> list[int]:
        allocator = self.allocator
        self.forward_peak = self.program_peak = 0
        for position, events in expansion.events():
            allocator.reset_peaks()
            allocator.replay(events)
            peak = allocator.peak_allocated_bytes
            self.peak_reserved = max(self.peak_reserved, allocator.peak_reserved_bytes)
            self.program_peak = max(self.program_peak, peak)
            if expansion.name_at(position) in _FORWARD:
                self.forward_peak = max(self.forward_peak, peak)
            if peak > self.peak:
                self.peak = peak
                self.peak_at = (expansion, position, Counter(self.residents))
        self.slot = expansion.end_slot
        return expansion.survivors

    def _optimizer(self, step: int, gradients: list[int]) -> None:
        """The step, then the end of the gradients."""
        expansion = self.trace.expand_optimizer(step, self.slot)
        sizes = self._gradient_bytes()
        self.residents["gradients"] += sizes
        states = self._run(expansion)
        self.residents["gradients"] -= sizes
        self.residents["optimizer state"] += sum(rounded(expansion.size_of(slot)) for slot in states)
        self.allocator.replay([~slot for slot in gradients])

    def _gradient_bytes(self) -> int:
        return sum(rounded(r.size_bytes) for r in self.trace.residents if r.part == "adapters")

    def _parts_at_peak(self) -> dict[str, int]:
        """What lives at the worst moment, by part; the allocator's own slack closes the sum."""
        assert self.peak_at is not None
        expansion, worst, residents = self.peak_at
        live = Counter(residents)
        alive: dict[int, tuple[str, int]] = {}
        best, total = Counter(live), sum(live.values())
        highest = 0
        for position, events in expansion.events():
            slot, base = expansion.slot_base(position), expansion.slot_base(position)
            for event in events:
                if event >= 0:
                    part, size = expansion.part(position, slot - base), rounded(event)
                    alive[slot] = (part, size)
                    slot += 1
                    live[part] += size
                    total += size
                    if position == worst and total > highest:
                        highest, best = total, Counter(live)
                elif ~event in alive:
                    part, size = alive.pop(~event)
                    live[part] -= size
                    total -= size
            if position == worst:
                break
        parts = {part: size for part, size in best.items() if size}
        slack = self.peak - sum(parts.values())
        if slack:
            parts["allocator rounding"] = slack
        return parts


_FORWARD = frozenset({"begin", "forward", "forward_chunk", "forward_end"})
