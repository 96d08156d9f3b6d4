"""A trace to step time: for each kernel the larger of FLOPs ÷ rate, bytes ÷ bandwidth and a launch, summed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from autotune.hardware.cards import Card
from autotune.predict.trace import Expansion, Trace, WorkSum, loop_of, monomials
from autotune.values import TrainingConfig

_SIXTEEN_BITS = ("float16", "bfloat16")

#: Of the 16-bit rate at boost clock that is left where the power limit lowers the clock, by card. Tesla T4: 24 of 65
#: TFLOP/s sustained at 4096³ in float16 (NVIDIA's developer forum, "About GPU peak performance", 264462: its 70 W
#: limit), over `Efficiency.matmul`. Other cards are taken at their catalogue clock, throttling laptops too.
POWER_CAPPED = {"Tesla T4": 24 / 65 / 0.70}


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of a card's rate and bandwidth that are reached, and seconds.

    `matmul`, `memory`, `dequantise` and the seconds were set beforehand, as large products and streaming kernels do
    on data-centre cards. `flash` is FlashAttention 2's paper (arXiv:2307.08691): 50 to 73 % of an A100 forward, up to
    63 % backward. Only `efficient` was chosen by looking at published rows, the SDPA ones on a T4, where 0.3 and 0.4
    order TinyLlama's speeds a little worse. The same rows are those that `benchmarks.speed_rank` judges by.
    """

    matmul: float = 0.70
    flash: float = 0.55
    efficient: float = 0.22  # SDPA's kernel for cards without FlashAttention
    memory: float = 0.75
    dequantise: float = 0.55
    no_bfloat16: float = 0.5  # of the float32 rate, for bfloat16 on a card without units; assumed, no published row
    causal: float = 0.5  # of the counted FLOPs of attention, which are those without a mask
    bus: float = 0.8  # of what PCIe carries one way, to and from pinned memory; assumed, no published row
    launch_s: float = 6e-6  # of an eager operator that the CPU has not queued ahead
    ramp_s: float = 5e-6  # before a product fills its card, and after: small ones reach less of the rate


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeForecast:
    """Seconds of one optimizer step, and where they go: `by_kind` sums to `step_time_s`."""

    step_time_s: float
    low_s: float
    high_s: float
    micro_batch_s: float
    optimizer_s: float
    by_kind: dict[str, float]


#: Of step time. 31 published configs on two cards (A100-80GB, T4) took 0.93 to 1.18 times what is predicted; the rest
#: is allowance, not measured: for other cards, throttling, host-bound loops. `python -m benchmarks.speed_rank`.
INTERVAL = (0.8, 1.5)


def forecast_time(
    trace: Trace,
    config: TrainingConfig,
    card: Card,
    *,
    efficiency: Efficiency | None = None,
    learned_factor: float = 1.0,
) -> TimeForecast:
    """Predicted time of an optimizer step of `config` on `card`, times what was learned of this machine.

    Raises `NotAlike` where the trace does not hold.
    """
    clock = _Clock(card, efficiency or Efficiency(), learned_factor)
    batch, tokens = config.micro_batch_size, config.sequence_length
    expansion = trace.expand("first", batch, tokens)
    expanded = trace.totals(batch, tokens)["chunks"]
    chunk_share = trace.chunks(batch, tokens) / expanded if expanded else 1.0
    micro = clock.by_kind(expansion, monomials(batch, tokens), chunk_share)
    optimizer = sum(clock.by_kind(trace.expand_optimizer(1), monomials(1, 1)).values())
    by_kind = {kind: seconds * config.gradient_accumulation_steps for kind, seconds in micro.items()}
    by_kind["optimizer"] = optimizer
    step = sum(by_kind.values())
    return TimeForecast(
        step_time_s=step,
        low_s=step * INTERVAL[0],
        high_s=step * INTERVAL[1],
        micro_batch_s=sum(micro.values()),
        optimizer_s=optimizer,
        by_kind=by_kind,
    )


#: Bytes per second and lane, one way, after encoding (PCI-SIG's 8, 16, 32 GT/s at 128b/130b).
_LANE_BYTES_PER_S = {"3": 0.985e9, "4": 1.969e9, "5": 3.938e9}
_USUAL_BUS = 16 * _LANE_BYTES_PER_S["4"]


def bus_bytes_per_s(bus: str) -> float:
    """Of a card's connection to its host, such as "PCIe 4.0 x8"; a module without one in its name has 4.0 x16."""
    found = re.search(r"PCIe ([345])(?:\.0)? x(\d+)", bus)
    return _LANE_BYTES_PER_S[found[1]] * int(found[2]) if found else _USUAL_BUS


class _Clock:
    """Seconds of kernels with these settings on this card."""

    def __init__(self, card: Card, reached: Efficiency, factor: float) -> None:
        self.card, self.reached, self.factor = card, reached, factor
        self.attention = {
            "flash": reached.flash / reached.causal,
            "efficient": reached.efficient / reached.causal,
            "masked": reached.efficient,
        }

    def by_kind(self, expansion: Expansion, values: tuple[int, ...], chunk_share: float = 1.0) -> dict[str, float]:
        """Each block is reckoned once and counted as often as it stands in the step; of the loss's chunks a share."""
        found: dict[str, float] = {}
        operators: Counter[str] = Counter()
        for number, times in Counter(item.block for item in expansion.order).items():
            block = expansion.blocks[number]
            share = times * (chunk_share if loop_of(block.name) == "chunks" else 1.0) * self.factor
            for work in block.works:
                found[work.kind] = found.get(work.kind, 0.0) + self.seconds(work, values) * share
            for operator in block.operators:
                operators[operator.split(".")[1] if "bitsandbytes." in operator else ""] += times
        # A product with 4-bit weights dequantises them first: as often again as the backward does on its own.
        if operators["dequantize_4bit"] and "dequantise" in found:
            found["dequantise"] *= 1 + operators["gemm_4bit"] / operators["dequantize_4bit"]
        return found

    def seconds(self, work: WorkSum, values: tuple[int, ...]) -> float:
        """All kernels of one sum."""
        flops = sum(size.at(values) for size in work.flops)
        moved = sum(size.at(values) for size in work.moved)
        share = self.reached.dequantise if work.kind == "dequantise" else self.reached.memory
        compute = 0.0
        if work.kind == "transfer":
            return work.count * (self.reached.launch_s + moved / (bus_bytes_per_s(self.card.bus) * self.reached.bus))
        if flops and work.kind in self.attention:
            compute = flops / (self._rate(work.dtype) * self.attention[work.kind])
        elif flops:
            compute = flops / (self._rate(work.dtype) * self.reached.matmul) + self.reached.ramp_s
        return work.count * max(self.reached.launch_s, compute, moved / (self.card.bandwidth_bytes_per_s * share))

    def _rate(self, dtype: str) -> float:
        """FLOP/s in this dtype. float32 is without TF32, which torch leaves off."""
        if dtype not in _SIXTEEN_BITS:
            return self.card.fp32_flops_per_s
        rate = self.card.fp16_flops_per_s if dtype == "float16" else self.card.bf16_flops_per_s
        if rate is None:
            return self.card.fp32_flops_per_s * self.reached.no_bfloat16
        return rate * POWER_CAPPED.get(self.card.name, 1.0)
