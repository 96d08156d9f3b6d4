"""A forecast as pictures: memory over one step by part, a frontier, and the history that PyTorch's viewer reads."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from autotune.predict.forecast import Forecast, Target
from autotune.predict.kernels import KernelSet
from autotune.predict.memory import rounded
from autotune.predict.trace import Expansion, Trace
from autotune.values import GIB, TrainingConfig

SAMPLES = 400
_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 940, 420, 60, 40, 260
#: Parts from the bottom up, each with its colour.
_COLOURS = {
    "other programs": "#d9d9d9",
    "CUDA context": "#a0a0a0",
    "HIP context": "#a0a0a0",
    "paged optimizer state": "#c7e9b4",
    "base weights": "#4e79a7",
    "quantisation state": "#86a9cf",
    "adapters": "#59a14f",
    "optimizer state": "#8cd17d",
    "library workspaces": "#bab0ac",
    "gradients": "#b6992d",
    "checkpointed activations": "#f1ce63",
    "layer activations": "#f28e2b",
    "attention": "#e15759",
    "dequantised weights": "#d37295",
    "casts": "#b07aa1",
    "logits and loss": "#9c755f",
    "other": "#79706e",
}


def _states(trace: Trace, config: TrainingConfig, kernels: KernelSet) -> Iterator[Counter[str]]:
    """What lives by part after each event of one micro batch (two if gradients accumulate) and its optimizer step."""
    live: Counter[str] = Counter()
    for resident in trace.residents:
        live[resident.part] += rounded(resident.size_bytes)
    if kernels.cublas_workspace_bytes:
        live["library workspaces"] += 2 * rounded(kernels.cublas_workspace_bytes)
    first = trace.expand_optimizer(0)
    for _ in _walk(first, Counter()):
        pass
    live["optimizer state"] += sum(rounded(first.size_of(slot)) for slot in first.survivors)
    yield Counter(live)
    expansion = trace.expand("first", config.micro_batch_size, config.sequence_length)
    for _ in _walk(expansion, live):
        yield live
    if config.gradient_accumulation_steps > 1:  # the gradients of the first live through it
        both = Counter(live)
        for _ in _walk(trace.expand("next", config.micro_batch_size, config.sequence_length), both):
            yield both
    for _ in _walk(trace.expand_optimizer(1), live):
        yield live


def _walk(expansion: Expansion, live: Counter[str]) -> Iterator[tuple[str, int, int, str]]:
    """(part, bytes, slot, operator) of each event, negative bytes where a storage dies; `live` is kept up to date."""
    alive: dict[int, tuple[str, int, str]] = {}
    for position, events in expansion.events():
        slot = base = expansion.slot_base(position)
        operators = expansion.blocks[expansion.order[position].block].operators
        for event in events:
            if event >= 0:
                part, size, operator = expansion.part(position, slot - base), rounded(event), operators[slot - base]
                alive[slot] = (part, size, operator)
                live[part] += size
                yield part, size, slot, operator
                slot += 1
            elif ~event in alive:
                part, size, operator = alive.pop(~event)
                live[part] -= size
                yield part, -size, ~event, operator


def svg_of_step(trace: Trace, found: Forecast, target: Target, *, title: str) -> str:
    """Stacked areas of what the device shows in use over micro batches and an optimizer step, but for what the
    allocator caches; of each sample its highest moment."""
    beside = _beside_tensors(found, target)
    highest = [
        Counter({part: round(size * found.memory_factor) for part, size in sample.items()}) + beside
        for sample in _samples(trace, found.config, target.kernels)
    ]
    limit = None if found.capacity_bytes is None else found.capacity_bytes - target.headroom_bytes
    top = max(max(sample.total() for sample in highest), found.device_used_bytes, limit or 0) * 1.05
    wide = (_WIDTH - _LEFT - _LEGEND) / max(1, len(highest) - 1)

    def at(i: int, size: float) -> str:
        return f"{_LEFT + i * wide:.1f},{_TOP + _HEIGHT * (1 - size / top):.1f}"

    drawn = [*_COLOURS, *sorted({part for sample in highest for part in sample} - set(_COLOURS))]
    below = [0] * len(highest)
    shapes, legend = [], []
    for part in drawn:
        above = [low + sample[part] for low, sample in zip(below, highest, strict=True)]
        if above == below:
            continue
        line = [at(i, size) for i, size in enumerate(above)] + [at(i, s) for i, s in reversed(list(enumerate(below)))]
        colour = _COLOURS.get(part, "#cccccc")
        shapes.append(f'<polygon points="{" ".join(line)}" fill="{colour}"><title>{escape(part)}</title></polygon>')
        peak = max(sample[part] for sample in highest) / GIB
        legend.append((colour, f"{part} {peak:.2f} GiB"))
        below = above
    if limit is not None:
        kept = ", with some kept free" if target.headroom_bytes else ""
        shapes.append(_level(limit, top, f"{limit / GIB:.1f} GiB to fit in{kept}", "#c00"))
    held = "" if target.kernels.kind == "cpu" else "with what is reserved "
    words = f"{found.device_used_bytes / GIB:.1f} GiB {held}at the peak"
    shapes.append(_level(found.device_used_bytes, top, words, "#333", right=True))
    keys = [
        f'<rect x="{_WIDTH - _LEGEND + 15}" y="{_TOP + 22 * i}" width="12" height="12" fill="{colour}"/>'
        f'<text x="{_WIDTH - _LEGEND + 32}" y="{_TOP + 11 + 22 * i}">{escape(text)}</text>'
        for i, (colour, text) in enumerate(reversed(legend))
    ]
    batches = "two micro batches" if found.config.gradient_accumulation_steps > 1 else "one micro batch"
    below_axis = f"GiB; {batches}, forward to backward, then the optimizer step; what the allocator caches is not drawn"
    return _svg(title, [*_axis(top), *shapes, *keys], below_axis)


def _beside_tensors(found: Forecast, target: Target) -> Counter[str]:
    """What the device holds besides the allocator's memory, by part; none of it changes over a step."""
    context = "HIP context" if target.card is not None and target.card.vendor == "amd" else "CUDA context"
    return Counter(
        {
            "other programs": target.others_bytes,
            context: target.context.likely_bytes if target.context else 0,
            "paged optimizer state": found.memory.paged_bytes,
        }
    )


def _level(size: float, top: float, words: str, colour: str, *, right: bool = False) -> str:
    """A dashed line at so many bytes, named at its left or right end."""
    y = _TOP + _HEIGHT * (1 - size / top)
    x, anchor = (_WIDTH - _LEGEND - 4, "end") if right else (_LEFT + 4, "start")
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _LEGEND}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"'
        f' stroke-dasharray="6 4"/>'
        f'<text x="{x}" y="{y - 4:.1f}" text-anchor="{anchor}" fill="{colour}" stroke="white"'
        f' stroke-width="3" paint-order="stroke">{escape(words)}</text>'
    )


def _samples(trace: Trace, config: TrainingConfig, kernels: KernelSet) -> list[Counter[str]]:
    """At most `SAMPLES` moments: the highest of each run of events."""
    count = sum(1 for _ in _states(trace, config, kernels))
    run = -(-count // SAMPLES)
    out: list[Counter[str]] = []
    best = -1
    for i, state in enumerate(_states(trace, config, kernels)):
        if i % run == 0:
            out.append(Counter())
            best = -1
        total = sum(state.values())
        if total > best:
            best, out[-1] = total, Counter(state)
    return out


def svg_of_sweep(
    points: Sequence[tuple[int, float | None, float | None, bool]],
    *,
    x_name: str,
    title: str,
    hollow: str = "does not fit",
) -> str:
    """Memory (GiB) and speed (tokens/s) over x, each on its own scale; a point that is False is hollow: what `hollow`
    says."""
    drawn = []
    xs = [point[0] for point in points]
    for column, colour, name in ((1, "#4e79a7", "memory in use, GiB"), (2, "#f28e2b", "tokens/s")):
        values = [point[column] for point in points]
        top = max((float(v) for v in values if v is not None), default=1.0) * 1.1 or 1.0
        places = [
            (
                _LEFT + (_WIDTH - _LEFT - 40) * (i / max(1, len(xs) - 1)),
                _TOP + _HEIGHT * (1 - float(v) / top),
                point[3],
                float(v),
            )
            for i, (point, v) in enumerate(zip(points, values, strict=True))
            if v is not None
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" stroke="{colour}" fill="{colour if filled else "white"}"/>'
            f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle" fill="{colour}">{value:,.4g}</text>'
            for x, y, filled, value in places
        ]
        drawn.append(f'<text x="{_LEFT + 300 * (column - 1)}" y="{_TOP - 6}" fill="{colour}">{escape(name)}</text>')
    ticks = [
        f'<text x="{_LEFT + (_WIDTH - _LEFT - 40) * (i / max(1, len(xs) - 1)):.1f}" y="{_TOP + _HEIGHT + 18}"'
        f' text-anchor="middle">{x:,}</text>'
        for i, x in enumerate(xs)
    ]
    return _svg(title, [*drawn, *ticks], f"{x_name}; hollow: {hollow}")


def _axis(top: float) -> list[str]:
    lines = []
    for i in range(6):
        y = _TOP + _HEIGHT * (1 - i / 5)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _LEGEND}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * i / 5 / GIB:.1f}</text>'
        )
    return lines


def _svg(title: str, shapes: list[str], below: str) -> str:
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + 90}" font-family="sans-serif"'
        f' font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{_LEFT}" y="18" font-size="15">{escape(title)}</text>\n{body}\n'
        f'<text x="{_LEFT}" y="{_TOP + _HEIGHT + 40}">{escape(below)}</text>\n</svg>\n'
    )


def viewer_snapshot(trace: Trace, config: TrainingConfig, kernels: KernelSet) -> bytes:
    """A pickle as torch.cuda.memory._dump_snapshot writes it, for pytorch.org/memory_viz: one micro batch.

    Addresses are made up: each storage has its own. A frame names the part and the operator.
    """
    expansion = trace.expand("first", config.micro_batch_size, config.sequence_length)
    events: list[dict[str, Any]] = []
    address: dict[int, int] = {}
    free = 1 << 40

    def record(action: str, where: int, size: int, part: str, operator: str) -> None:
        frames = [{"filename": part, "line": 0, "name": operator or part}]
        events.append(
            {"action": action, "addr": where, "size": size, "stream": 0, "frames": frames, "time_us": len(events)}
        )

    for resident in trace.residents:
        record("alloc", free, rounded(resident.size_bytes), resident.part, "")
        free += rounded(resident.size_bytes)
    for part, size, slot, operator in _walk(expansion, Counter()):
        if size > 0:
            address[slot] = free
            record("alloc", free, size, part, operator)
            free += size
        else:
            record("free_requested", address[slot], -size, part, operator)
            record("free_completed", address[slot], -size, part, operator)
    return pickle.dumps({"segments": [], "device_traces": [events], "allocator_settings": {}}, protocol=4)
