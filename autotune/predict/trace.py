"""What a dry run leaves behind: births and deaths whose sizes are formulas of (B, T), layers to be repeated. Pure.

A trace is made once for a model, settings and kernels; from it follow, without torch, the events of any micro batch
size B and sequence length T of its class.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

#: Products that a tensor's size can be a multiple of, in samples B and tokens T.
MONOMIALS = ("1", "T", "T-1", "T+1", "B", "BT", "B(T-1)", "B(T+1)", "TT", "BTT", "B+1", "BT-1", "BT+1")
FORMAT = 5


def monomials(batch: int, tokens: int) -> tuple[int, ...]:
    """The value of each of `MONOMIALS`."""
    return (
        1,
        tokens,
        tokens - 1,
        tokens + 1,
        batch,
        batch * tokens,
        batch * (tokens - 1),
        batch * (tokens + 1),
        tokens * tokens,
        batch * tokens * tokens,
        batch + 1,
        batch * tokens - 1,
        batch * tokens + 1,
    )


class NotAlike(ValueError):
    """Two points of one trace differ in more than sizes: what was traced holds for its own point alone."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes (or FLOPs) as one multiple of one monomial."""

    monomial: int
    factor: Fraction

    def at(self, values: tuple[int, ...]) -> int:
        return -(-self.factor.numerator * values[self.monomial] // self.factor.denominator)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSum:
    """Kernels of one kind and dtype in one stretch that grow alike: FLOPs and bytes of one, how many."""

    kind: str
    dtype: str
    flops: tuple[Size, ...]
    moved: tuple[Size, ...]
    count: int = 1


@dataclass(slots=True)
class Block:
    """One stretch: `events` has a birth's ordinal (0, 1, …), or ~k for the death of `deaths[k]`."""

    name: str
    index: int | None  # layer or chunk in the traced model
    sizes: list[int] = field(default_factory=list)  # of each birth, an index into Trace.sizes
    parts: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    deaths: list[tuple[int, int]] = field(default_factory=list)  # (block, ordinal)
    works: list[WorkSum] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Blocks that stand for a run of alike ones: `total` in all, `kept` in the trace, `period` after `head` repeated.

    total None: the chunks of a loss, whose number follows from B and T.
    """

    kept: int
    head: int
    period: int
    total: int | None = None

    def repeats(self, total: int) -> int:
        return 1 + (total - self.kept) // self.period if self.period else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A block where it stands in the whole step."""

    block: int
    index: int | None  # layer or chunk in the whole model


def loop_of(name: str) -> str | None:
    """Which loop a stretch of this name belongs to."""
    if name in ("forward", "backward"):
        return "layers"
    return "chunks" if name.endswith("_chunk") else None


def instances(blocks: list[Block], loops: dict[str, Loop], totals: dict[str, int]) -> list[Instance]:
    """The blocks of the whole step in order, repeated ones repeated; `totals`: layers and chunks there are."""
    out: list[Instance] = []
    i = 0
    while i < len(blocks):
        block = blocks[i]
        name = loop_of(block.name)
        loop = loops.get(name) if name else None
        if loop is None or block.index is None:
            out.append(Instance(block=i, index=block.index))
            i += 1
            continue
        repeats = loop.repeats(totals[name or ""])
        if not loop.head <= block.index < loop.head + loop.period:
            out.append(Instance(block=i, index=_actual(block.index, loop, repeats)))
            i += 1
            continue
        run = [i]
        while i + len(run) < len(blocks) and _repeated(blocks[i + len(run)], block.name, loop):
            run.append(i + len(run))
        ascending = len(run) < 2 or blocks[run[0]].index < blocks[run[1]].index  # type: ignore[operator]
        ascending = ascending and not block.name.startswith("backward")
        for turn in range(repeats) if ascending else reversed(range(repeats)):
            for j in run:
                index = blocks[j].index
                assert index is not None
                out.append(Instance(block=j, index=index + turn * loop.period))
        i += len(run)
    return out


def _repeated(block: Block, name: str, loop: Loop) -> bool:
    return block.name == name and block.index is not None and loop.head <= block.index < loop.head + loop.period


def _actual(index: int, loop: Loop, repeats: int) -> int:
    return index if index < loop.head + loop.period else index + (repeats - 1) * loop.period


def _kept(index: int, loop: Loop, total: int) -> int:
    """The traced index that stands for this one of the whole model."""
    tail = loop.kept - loop.head - loop.period
    if index < loop.head:
        return index
    if index >= total - tail:
        return index - (total - loop.kept)
    return loop.head + (index - loop.head) % loop.period if loop.period else index


class Expansion:
    """One program of a trace at (B, T), in the whole model: blocks in order, with sizes and who frees what."""

    def __init__(
        self, blocks: list[Block], loops: dict[str, Loop], totals: dict[str, int], sizes: list[int], first_slot: int = 0
    ) -> None:
        self.blocks = blocks
        self.order = instances(blocks, loops, totals)
        self._loops, self._totals = loops, totals
        self.sizes = sizes
        self._bases: list[int] = []
        self._where: dict[tuple[int, int | None], int] = {}  # (block, index) → slot base
        slot = first_slot
        for item in self.order:
            self._bases.append(slot)
            self._where[(item.block, item.index)] = slot
            slot += len(blocks[item.block].sizes)
        self.end_slot = slot
        self._by_name = {(block.name, block.index): i for i, block in enumerate(blocks)}
        self.survivors: list[int] = []

    def events(self) -> Iterator[tuple[int, list[int]]]:
        """(position in `order`, events): a positive number allocates so many bytes (slots count up), ~slot frees."""
        bytes_of = self.sizes
        dead: set[int] = set()
        for position, item in enumerate(self.order):
            block = self.blocks[item.block]
            birth_bytes = [bytes_of[s] for s in block.sizes]
            if not block.deaths:
                yield position, [birth_bytes[e] for e in block.events]
                continue
            slots = [self._slots(item, block, target) for target in block.deaths]
            if all(len(s) == 1 for s in slots):
                codes = [~s[0] for s in slots]
                dead.update(s[0] for s in slots)
                yield position, [birth_bytes[e] if e >= 0 else codes[~e] for e in block.events]
                continue
            out: list[int] = []
            for event in block.events:
                if event >= 0:
                    out.append(birth_bytes[event])
                else:
                    out += [~s for s in slots[~event]]
                    dead.update(slots[~event])
            yield position, out
        first = self._bases[0] if self._bases else 0
        self.survivors = [slot for slot in range(first, self.end_slot) if slot not in dead]

    def _slots(self, item: Instance, block: Block, target: tuple[int, int]) -> list[int]:
        """Where the storage `target` of the traced model is in the whole one: one slot, or one a repeat."""
        other = self.blocks[target[0]]
        name = loop_of(other.name)
        loop = self._loops.get(name) if name else None
        if loop is None or other.index is None:
            return [self._where[(target[0], other.index)] + target[1]]
        total = self._totals[name or ""]
        repeats = loop.repeats(total)
        same = loop_of(block.name) == name and block.index is not None and item.index is not None
        if same and abs(other.index - (block.index or 0)) <= loop.period:
            assert item.index is not None
            assert block.index is not None
            index = item.index + other.index - block.index
            kept = _kept(index, loop, total)
            return [self._where[(self._by_name[(other.name, kept)], index)] + target[1]]
        if loop.head <= other.index < loop.head + loop.period:
            return [self._where[(target[0], other.index + turn * loop.period)] + target[1] for turn in range(repeats)]
        return [self._where[(target[0], _actual(other.index, loop, repeats))] + target[1]]

    def part(self, position: int, ordinal: int) -> str:
        return self.blocks[self.order[position].block].parts[ordinal]

    def name_at(self, position: int) -> str:
        return self.blocks[self.order[position].block].name

    def size_of(self, slot: int) -> int:
        position = bisect.bisect_right(self._bases, slot) - 1
        block = self.blocks[self.order[position].block]
        return self.sizes[block.sizes[slot - self._bases[position]]]

    def slot_base(self, position: int) -> int:
        return self._bases[position]


@dataclass(slots=True)
class Resident:
    """A tensor of the whole model that lives as long as it: its bytes and its part."""

    size_bytes: int
    part: str  # base weights | quantisation state | adapters
    load_bytes: int = 0  # of the 16-bit tensor that is quantised to it while loading; 0: it is loaded as it is
    before_bytes: int = 0  # its size before its dtype was prepared; 0: the same


@dataclass(slots=True)
class Trace:
    """Everything that a prediction needs of a model with these settings on these kernels."""

    sizes: list[Size]
    programs: dict[str, list[Block]]  # first, next, evaluate
    optimizer: list[list[Block]]  # first step, later steps; sizes are constants
    residents: list[Resident]
    loops: dict[str, Loop]
    parameters: int
    unquantized_bytes: int
    vocab_size: int
    chunk_tokens: int = 0  # tokens of one chunk of the loss; 0: it has none
    point: tuple[int, int] | None = None  # (B, T) that it holds for alone; None: all of its class
    is_of_one: bool = False  # traced with micro batches of one sample: no other's trace, and no other follows from it
    paged_bytes: int = 0  # optimizer state in managed memory, which no allocator counts

    def totals(self, batch: int, tokens: int) -> dict[str, int]:
        """Layers, and chunks of the loss: never fewer than were traced, for each lives by itself and takes as much."""
        layers = self.loops.get("layers")
        loop = self.loops.get("chunks")
        chunks = max(self.chunks(batch, tokens), loop.kept) if loop and self.chunk_tokens else 0
        return {"layers": (layers.total or 0) if layers else 0, "chunks": chunks}

    def chunks(self, batch: int, tokens: int) -> int:
        """Chunks that the loss really has; 0: it has none."""
        loop = self.loops.get("chunks")
        return -(-batch * tokens // self.chunk_tokens) * loop.period if loop and self.chunk_tokens else 0

    def expand(self, program: str, batch: int, tokens: int, first_slot: int = 0) -> Expansion:
        if self.point is not None and self.point != (batch, tokens):
            raise NotAlike(f"traced at {self.point} alone")
        if self.is_of_one != (batch == 1):
            raise NotAlike("one sample and several are traced apart")
        if batch * tokens < self.chunk_tokens:
            raise NotAlike(f"{batch * tokens} tokens are fewer than a chunk of the loss")
        values, totals = monomials(batch, tokens), self.totals(batch, tokens)
        sizes = [size.at(values) for size in self.sizes]
        return Expansion(self.programs[program], self.loops, totals, sizes, first_slot)

    def expand_optimizer(self, step: int, first_slot: int = 0) -> Expansion:
        sizes = [size.at(monomials(1, 1)) for size in self.sizes]
        return Expansion(self.optimizer[min(step, len(self.optimizer) - 1)], {}, {}, sizes, first_slot)


def to_document(trace: Trace) -> dict[str, Any]:
    """As JSON can hold it."""
    strings: dict[str, int] = {}

    def number(text: str) -> int:
        return strings.setdefault(text, len(strings))

    def size(item: Size) -> list[int]:
        return [item.monomial, item.factor.numerator, item.factor.denominator]

    def block(item: Block) -> list[Any]:
        return [
            number(item.name),
            item.index,
            item.sizes,
            [number(p) for p in item.parts],
            [number(o) for o in item.operators],
            item.events,
            item.deaths,
            [
                [number(w.kind), number(w.dtype), [size(s) for s in w.flops], [size(s) for s in w.moved], w.count]
                for w in item.works
            ],
        ]

    document = {
        "format": FORMAT,
        "sizes": [size(item) for item in trace.sizes],
        "programs": {name: [block(b) for b in blocks] for name, blocks in trace.programs.items()},
        "optimizer": [[block(b) for b in blocks] for blocks in trace.optimizer],
        "residents": [[r.size_bytes, number(r.part), r.load_bytes, r.before_bytes] for r in trace.residents],
        "loops": {name: [loop.kept, loop.head, loop.period, loop.total] for name, loop in trace.loops.items()},
        "parameters": trace.parameters,
        "unquantized_bytes": trace.unquantized_bytes,
        "vocab_size": trace.vocab_size,
        "chunk_tokens": trace.chunk_tokens,
        "point": trace.point,
        "is_of_one": trace.is_of_one,
        "paged_bytes": trace.paged_bytes,
    }
    document["strings"] = list(strings)
    return document


def from_document(document: dict[str, Any]) -> Trace:
    """Raises ValueError for a document of another format, or without all programs."""
    if document.get("format") != FORMAT or not {"first", "next", "evaluate"} <= set(document["programs"]):
        raise ValueError(f"trace of format {document.get('format')!r}, not {FORMAT}, or not whole")
    strings = document["strings"]

    def size(item: list[int]) -> Size:
        return Size(item[0], Fraction(item[1], item[2]))

    def block(item: list[Any]) -> Block:
        name, index, sizes, parts, operators, events, deaths, works = item
        return Block(
            name=strings[name],
            index=index,
            sizes=sizes,
            parts=[strings[p] for p in parts],
            operators=[strings[o] for o in operators],
            events=events,
            deaths=[(b, o) for b, o in deaths],
            works=[
                WorkSum(
                    kind=strings[kind],
                    dtype=strings[dtype],
                    flops=tuple(size(s) for s in flops),
                    moved=tuple(size(s) for s in moved),
                    count=count,
                )
                for kind, dtype, flops, moved, count in works
            ],
        )

    return Trace(
        sizes=[size(item) for item in document["sizes"]],
        programs={name: [block(b) for b in blocks] for name, blocks in document["programs"].items()},
        optimizer=[[block(b) for b in blocks] for blocks in document["optimizer"]],
        residents=[Resident(n, strings[part], load, before) for n, part, load, before in document["residents"]],
        loops={
            name: Loop(kept=kept, head=head, period=period, total=total)
            for name, (kept, head, period, total) in document["loops"].items()
        },
        parameters=document["parameters"],
        unquantized_bytes=document["unquantized_bytes"],
        vocab_size=document["vocab_size"],
        chunk_tokens=document["chunk_tokens"],
        point=tuple(document["point"]) if document["point"] else None,
        is_of_one=document["is_of_one"],
        paged_bytes=document["paged_bytes"],
    )
