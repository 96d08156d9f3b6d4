"""From the raw stretches of a dry run at one or two points to a `Trace` with formulas for sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from autotune.predict.trace import MONOMIALS, Block, Loop, NotAlike, Size, WorkSum, monomials
from autotune.predict.tracer import Birth, Death, Stretch, Work

#: Chunks of a loss that a trace keeps, in periods: the repeated one has one like it on either side.
KEPT_CHUNKS, HEAD_CHUNKS = 5, 2


@dataclass(slots=True)
class _Raw:
    """One stretch with its storages named by block and ordinal."""

    name: str
    index: int | None
    births: list[Birth] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    deaths: list[tuple[int, int]] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)


def raw_blocks(stretches: list[Stretch]) -> list[_Raw]:
    """Births get an ordinal in their stretch, deaths the place of their birth."""
    blocks: list[_Raw] = []
    home: dict[int, tuple[int, int]] = {}
    for stretch in stretches:
        block = _Raw(stretch.label[0], stretch.label[1])
        blocks.append(block)
        for event in stretch.events:
            if isinstance(event, Birth):
                home[event.storage] = (len(blocks) - 1, len(block.births))
                block.events.append(len(block.births))
                block.births.append(event)
            elif isinstance(event, Death):
                if event.storage in home:
                    block.events.append(~len(block.deaths))
                    block.deaths.append(home[event.storage])
            else:
                block.works.append(event)
    return blocks


def chunk_loop(blocks: list[_Raw], period: int) -> Loop | None:
    """The loss's loop over chunks, or None where there are too few of them to leave any out."""
    count = 1 + max((b.index or 0 for b in blocks if b.name.endswith("_chunk")), default=-1)
    if count < KEPT_CHUNKS * period:
        return None
    return Loop(kept=KEPT_CHUNKS * period, head=HEAD_CHUNKS * period, period=period)


def compress_chunks(blocks: list[_Raw], loop: Loop) -> list[_Raw]:
    """Leave the repeats of the middle chunk out. Raises `NotAlike` where they are no repeats."""
    count = 1 + max(b.index or 0 for b in blocks if b.name.endswith("_chunk"))
    extra = count - loop.kept
    if extra == 0:
        return blocks
    first, end = loop.head + loop.period, loop.head + loop.period + extra
    drop = {
        i for i, b in enumerate(blocks) if b.name.endswith("_chunk") and b.index is not None and first <= b.index < end
    }
    place = {}
    kept: list[_Raw] = []
    for i, block in enumerate(blocks):
        if i not in drop:
            place[i] = len(kept)
            kept.append(block)
    middle = {
        (b.name, b.index): i
        for i, b in enumerate(kept)
        if b.name.endswith("_chunk") and b.index is not None and loop.head <= b.index < first
    }
    out = []
    for block in kept:
        renamed = _Raw(block.name, block.index, block.births, works=block.works)
        if block.name.endswith("_chunk") and block.index is not None and block.index >= end:
            renamed.index = block.index - extra
        for event in block.events:
            if event >= 0:
                renamed.events.append(event)
                continue
            target, ordinal = block.deaths[~event]
            stand_in = place.get(target)
            if stand_in is None and block.name == blocks[target].name:
                stand_in = _neighbour(blocks[target], block, loop, middle)
            if stand_in is not None:
                renamed.events.append(~len(renamed.deaths))
                renamed.deaths.append((stand_in, ordinal))
        out.append(renamed)
    return out


def _neighbour(dropped: _Raw, block: _Raw, loop: Loop, middle: dict[tuple[str, int], int]) -> int | None:
    """The repeated chunk that stands for a dropped one which `block`, the next to it, frees from; None for others."""
    if dropped.index is None or block.index is None or abs(dropped.index - block.index) > loop.period:
        return None
    return middle[(dropped.name, loop.head + (dropped.index - loop.head) % loop.period)]


class SizeTable:
    """Formulas, each kept once; found from the values of one size at two points of (B, T)."""

    def __init__(self, points: list[tuple[int, int]]) -> None:
        self.sizes: list[Size] = []
        self._values = [monomials(*point) for point in points]
        self._known: dict[Size, int] = {}
        self._found: dict[tuple[int, ...], Size] = {}

    def formula(self, seen: tuple[int, ...]) -> Size:
        """Raises `NotAlike` where no monomial has these values."""
        if seen not in self._found:
            self._found[seen] = self._search(seen)
        return self._found[seen]

    def _search(self, seen: tuple[int, ...]) -> Size:
        if len(seen) == 1:
            return Size(0, Fraction(seen[0]))
        for i in range(len(MONOMIALS)):
            if all(n * self._values[0][i] == seen[0] * v[i] for n, v in zip(seen[1:], self._values[1:], strict=True)):
                return Size(i, Fraction(seen[0], self._values[0][i]))
        raise NotAlike(f"sizes {seen} follow from no product of batch size and sequence length")

    def number(self, seen: tuple[int, ...]) -> int:
        size = self.formula(seen)
        if size not in self._known:
            self._known[size] = len(self.sizes)
            self.sizes.append(size)
        return self._known[size]


def fit(programs: list[list[_Raw]], table: SizeTable, *, checkpointed: bool) -> list[Block]:
    """One program traced at each point of the table, as blocks with formulas.

    Raises `NotAlike` where the points differ in more than sizes.
    """
    first = programs[0]
    for other in programs[1:]:
        _check_alike(first, other)
    born_in = {(i, k) for i, block in enumerate(first) for k in range(len(block.births))}
    survivors = born_in - {death for block in first for death in block.deaths}
    ends = {death: i for i, block in enumerate(first) for death in block.deaths}
    out = []
    for i, block in enumerate(first):
        made = Block(name=block.name, index=block.index, events=list(block.events), deaths=list(block.deaths))
        for k, birth in enumerate(block.births):
            made.sizes.append(table.number(tuple(p[i].births[k].size_bytes for p in programs)))
            made.operators.append(birth.operator)
            lives_on = ends.get((i, k), len(first)) != i
            made.parts.append(
                "gradients" if (i, k) in survivors else birth.part or _part(block.name, lives_on, checkpointed)
            )
        made.works = _work_sums([list(p[i].works) for p in programs], table)
        out.append(made)
    return out


def _part(stretch: str, lives_on: bool, checkpointed: bool) -> str:
    """The part of a storage whose operator does not tell it."""
    if stretch == "forward" and lives_on and checkpointed:
        return "checkpointed activations"
    if stretch.endswith("_chunk"):
        return "logits and loss"
    if stretch in ("forward", "backward", "forward_end", "backward_begin"):
        return "layer activations"
    return "other"


def _check_alike(one: list[_Raw], other: list[_Raw]) -> None:
    if len(one) != len(other):
        raise NotAlike("another number of stretches")
    for a, b in zip(one, other, strict=True):
        same = (a.name, a.index, a.events, a.deaths) == (b.name, b.index, b.events, b.deaths)
        if not same or [x.operator for x in a.births] != [x.operator for x in b.births] or len(a.works) != len(b.works):
            raise NotAlike(f"another course of {a.name} {a.index}")


def _work_sums(works: list[list[Work]], table: SizeTable) -> list[WorkSum]:
    counts: dict[WorkSum, int] = {}
    for same in zip(*works, strict=True):
        moved: dict[int, Fraction] = {}
        each = [w.moved_bytes for w in same]
        if len({len(one) for one in each}) > 1:  # as many tensors as there are chunks
            each = [(sum(one),) for one in each]
        for seen in zip(*each, strict=True):
            if not any(seen):
                continue
            size = table.formula(seen)
            moved[size.monomial] = moved.get(size.monomial, Fraction(0)) + size.factor
        flops = tuple(w.flops for w in same)
        one = WorkSum(
            kind=same[0].kind,
            dtype=same[0].dtype,
            flops=(table.formula(flops),) if any(flops) else (),
            moved=tuple(Size(m, f) for m, f in sorted(moved.items())),
        )
        counts[one] = counts.get(one, 0) + 1
    return [
        WorkSum(kind=w.kind, dtype=w.dtype, flops=w.flops, moved=w.moved, count=count) for w, count in counts.items()
    ]


def check_repeats(blocks: Iterable[Block], loop: Loop) -> None:
    """Raises `NotAlike` unless the repeated layers are like the ones before and after them."""
    of: dict[tuple[str, int], Block] = {
        (b.name, b.index): b for b in blocks if b.index is not None and b.name in ("forward", "backward")
    }
    for name in ("forward", "backward"):
        for index in range(loop.head, loop.head + loop.period):
            middle = of.get((name, index))
            for near in (index - loop.period, index + loop.period):
                other = of.get((name, near))
                if middle is None or other is None:
                    continue
                if near < loop.period or near >= loop.kept - loop.period:
                    continue  # the first or last of its kind: masks and positions of that kind begin and end there
                if middle.sizes != other.sizes or middle.events != other.events:
                    raise NotAlike(f"layer {near} is unlike layer {index} in {name}")


def without_accumulation(blocks: list[Block]) -> list[Block]:
    """`next` from `first`: gradients exist already, so what would become one dies as soon as it is added to it."""
    dead = {death for block in blocks for death in block.deaths}
    out = []
    for i, block in enumerate(blocks):
        made = Block(
            name=block.name,
            index=block.index,
            sizes=list(block.sizes),
            parts=list(block.parts),
            operators=list(block.operators),
            deaths=list(block.deaths),
            works=block.works,
        )
        for event in block.events:
            made.events.append(event)
            if event >= 0 and (i, event) not in dead:
                made.events.append(~len(made.deaths))
                made.deaths.append((i, event))
        out.append(made)
    return out
