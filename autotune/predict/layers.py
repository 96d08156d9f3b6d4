"""A model's layers are alike: which of them a dry run keeps, and how the rest follow from those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """`total` layers, of which `kept` are traced; after the first `head` kept ones, `period` of them are repeated."""

    total: int
    kept: int
    head: int  # kept layers before the ones that are repeated
    period: int

    @property
    def repeats(self) -> int:
        """How often the `period` layers after `head` stand in the whole model."""
        return 1 + (self.total - self.kept) // self.period if self.period else 1


def find_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder layers of a model: their owner, the attribute's name, the list."""
    total = int(model.config.num_hidden_layers)
    best: tuple[int, nn.Module, str, nn.ModuleList] | None = None
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == total:
                size = sum(p.numel() for p in child.parameters())
                if best is None or size > best[0]:
                    best = (size, owner, name, child)
    if best is None:
        raise LookupError("no list of decoder layers found")
    return best[1], best[2], best[3]


def find_pattern(layers: nn.ModuleList, *, every: int = 1, types: list[Any] | None = None) -> Pattern:
    """The shortest run of layers from which all others follow. `every`: layers to one checkpointed one."""
    signatures = [_signature(layer, types[i] if types else None) for i, layer in enumerate(layers)]
    total = len(signatures)
    for period in range(1, total // 2 + 1):
        if period % every:
            continue
        start = _head(signatures, period)
        if start is None:
            continue
        head = start + period  # one run before the repeated one and one after, so that its neighbours are like it
        least = head + 2 * period + 1
        kept = least + (total - least) % period
        if kept < total:
            return Pattern(total=total, kept=kept, head=head, period=period)
    return Pattern(total=total, kept=total, head=total, period=0)


def _head(signatures: list[str], period: int) -> int | None:
    """Layers before the periodic rest begins (at least one: the first layer's input is another's), or None where
    less than three periods follow."""
    start = len(signatures) - period
    while start > 0 and signatures[start - 1] == signatures[start - 1 + period]:
        start -= 1
    start = max(start, 1)
    return start if len(signatures) - start > 3 * period + 1 else None


def _signature(layer: nn.Module, kind: Any) -> str:
    """What decides what a layer allocates: its modules' classes, shapes and dtypes, and its plain settings."""
    parts = [str(kind), type(layer).__name__]
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in ("layer_idx", "training", "layer_id")
        }
        parts.append(f"{name}:{type(module).__name__}:{sorted(plain.items())}")
    parts += [f"{name}:{tuple(p.shape)}:{p.dtype}" for name, p in layer.named_parameters()]
    return "|".join(parts)


def keep_layers(model: Any, pattern: Pattern) -> None:
    """Cut a model down to the kept layers, in place: the first ones to the end of the repeats, and the last."""
    if pattern.kept == pattern.total:
        return
    owner, name, layers = find_layers(model)
    indexes = kept_indexes(pattern)
    setattr(owner, name, nn.ModuleList([layers[i] for i in indexes]))
    config = model.config
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == pattern.total:
            setattr(config, key, [value[i] for i in indexes])
    config.num_hidden_layers = pattern.kept


def kept_indexes(pattern: Pattern) -> list[int]:
    """Which of the whole model's layers are kept: the tail is the model's own tail."""
    tail = pattern.kept - pattern.head - pattern.period
    return [*range(pattern.head + pattern.period), *range(pattern.total - tail, pattern.total)]
