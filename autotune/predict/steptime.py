"""A trace to step time: for each kernel the larger of FLOPs ÷ rate, bytes ÷ bandwidth and a launch, summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from autotune.hardware.cards import Card
from autotune.predict.trace import Expansion, Trace, WorkSum, monomials
from autotune.values import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of a card's rate and bandwidth that are reached, and seconds between two kernels.

    Chosen once, from what large products and streaming kernels reach on data-centre cards, and not fitted to a row;
    `python -m benchmarks.speed_rank` shows how predicted and published speeds then order.
    """

    matmul: float = 0.70
    attention: float = 0.45  # FLOPs are counted full and causal kernels skip half: 0.9 of the count is 0.45 of the rate
    memory: float = 0.75
    dequantise: float = 0.55
    launch_s: float = 6e-6  # of an eager PyTorch operator that the CPU has not queued ahead
    small_matmul_flops: float = 2e9  # below about this a product does not fill a card


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForecast:
    """Seconds of one optimizer step, and where they go."""

    step_time_s: float
    low_s: float
    high_s: float
    micro_batch_s: float
    optimizer_s: float
    by_kind: dict[str, float]


#: Of step time. 19 published rows (A100-80GB and T4, seven settings) took 0.88 to 1.45 times the predicted time.
INTERVAL = (0.8, 1.5)


def forecast_time(
    trace: Trace, config: TrainingConfig, card: Card, *, efficiency: Efficiency | None = None
) -> TimeForecast:
    """Predicted time of an optimizer step of `config` on `card`. Raises `NotAlike` where the trace does not hold."""
    reached = efficiency or Efficiency()
    batch, tokens = config.micro_batch_size, config.sequence_length
    by_kind: dict[str, float] = {}
    micro = _seconds(trace.expand("first", batch, tokens), monomials(batch, tokens), card, reached, by_kind)
    optimizer = _seconds(trace.expand_optimizer(1), monomials(1, 1), card, reached, {})
    count = config.gradient_accumulation_steps
    step = count * micro + optimizer
    return TimeForecast(
        step_time_s=step,
        low_s=step * INTERVAL[0],
        high_s=step * INTERVAL[1],
        micro_batch_s=micro,
        optimizer_s=optimizer,
        by_kind={kind: seconds * count for kind, seconds in by_kind.items()},
    )


def _seconds(
    expansion: Expansion, values: tuple[int, ...], card: Card, reached: Efficiency, by_kind: dict[str, float]
) -> float:
    """Each block is reckoned once and counted as often as it stands in the step."""
    total = 0.0
    for block, times in Counter(item.block for item in expansion.order).items():
        for kind, seconds in _kernels(expansion.blocks[block].works, values, card, reached):
            by_kind[kind] = by_kind.get(kind, 0.0) + seconds * times
            total += seconds * times
    return total


def _kernels(
    works: Iterable[WorkSum], values: tuple[int, ...], card: Card, reached: Efficiency
) -> Iterable[tuple[str, float]]:
    for work in works:
        flops = sum(size.at(values) for size in work.flops)
        moved = sum(size.at(values) for size in work.moved)
        share = getattr(reached, work.kind)
        compute = 0.0
        if flops:
            fill = flops / (flops + reached.small_matmul_flops) if work.kind == "matmul" else 1.0
            compute = flops / (_rate(card, work.dtype) * share * max(fill, 0.02))
        bandwidth = card.bandwidth_bytes_per_s * (reached.memory if flops else share)
        yield work.kind, work.count * max(reached.launch_s, compute, moved / bandwidth)


def _rate(card: Card, dtype: str) -> float:
    """FLOP/s of a product in this dtype; what has no units runs in float32."""
    rates = {"bfloat16": card.bf16_flops_per_s, "float16": card.fp16_flops_per_s}
    return rates.get(dtype) or card.fp32_flops_per_s
