from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.allocator import CachingAllocator, OutOfMemory
from autotune.values import MIB

KIB = 1024


@dataclass
class Piece:
    """A block, or unmapped pages (`is_mapped` false), as the slow model keeps it."""

    address: int
    size: int
    requested: int | None = None  # None: free
    is_mapped: bool = True

    @property
    def is_free(self) -> bool:
        return self.is_mapped and self.requested is None


@dataclass
class Run:
    """A segment, or the whole range of an expandable one: pieces without a gap."""

    pieces: list[Piece]
    is_small: bool
    page: int = 0  # 0: a cudaMalloc

    def tidy(self) -> None:
        """Merge what is alike and not in use."""
        merged = self.pieces[:1]
        for piece in self.pieces[1:]:
            last = merged[-1]
            if last.requested is None and piece.requested is None and last.is_mapped == piece.is_mapped:
                last.size += piece.size
            else:
                merged.append(piece)
        self.pieces = merged

    def cut(self, address: int) -> None:
        """Make a piece begin at `address`."""
        for index, piece in enumerate(self.pieces):
            if piece.address < address < piece.address + piece.size:
                rest = Piece(address, piece.address + piece.size - address, None, piece.is_mapped)
                piece.size -= rest.size
                self.pieces.insert(index + 1, rest)

    def remap(self, start: int, stop: int, is_mapped: bool) -> None:
        self.cut(start)
        self.cut(stop)
        for piece in self.pieces:
            if start <= piece.address < stop:
                piece.is_mapped = is_mapped
        self.tidy()


@dataclass
class SlowAllocator:
    """The same rules told in another way: lists of pieces, searched from end to end, in bytes."""

    limit: int | None = None
    expandable: bool = False
    max_split: int | None = None
    runs: list[Run] = field(default_factory=list)
    live: dict[int, tuple[Run, Piece] | None] = field(default_factory=dict)
    count: int = 0
    retries: int = 0

    def __post_init__(self) -> None:
        if self.expandable:
            self.runs = [
                Run([Piece(base << 40, 1 << 38, None, False)], page == 2 * MIB, page)
                for base, page in ((20, 2 * MIB), (40, 20 * MIB))
            ]

    @property
    def mapped(self) -> list[Piece]:
        return [piece for run in self.runs for piece in run.pieces if piece.is_mapped]

    @property
    def reserved(self) -> int:
        return sum(piece.size for piece in self.mapped)

    @property
    def allocated(self) -> int:
        return sum(piece.size for piece in self.mapped if not piece.is_free)

    def allocate(self, requested: int) -> bool:
        """False: out of memory."""
        handle, self.count = self.count, self.count + 1
        if not requested:
            self.live[handle] = None
            return True
        size = -(-requested // 512) * 512
        found = self.find(size) or self.obtain(size)
        if not found:
            self.count -= 1
            return False
        run, piece = found
        rest = piece.size - size
        if rest > (0 if run.is_small or self.expandable else MIB) and (self.expandable or not self.is_oversize(size)):
            run.cut(piece.address + size)
        piece.requested = requested
        self.live[handle] = found
        return True

    def free(self, handle: int) -> None:
        if found := self.live.pop(handle):
            found[1].requested = None
            found[0].tidy()

    def is_oversize(self, size: int) -> bool:
        return self.max_split is not None and size >= self.max_split

    def find(self, size: int) -> tuple[Run, Piece] | None:
        fits = [
            (piece.size, piece.address, run, piece)
            for run in self.runs
            for piece in run.pieces
            if run.is_small == (size <= MIB) and piece.is_free and piece.size >= size
        ]
        fits.sort(key=lambda fit: fit[:2])
        while self.expandable and len(fits) > 1 and self.room(*fits[1][2:]) < self.room(*fits[0][2:]):
            fits.pop(0)
        if not fits or (self.is_oversize(fits[0][0]) and not self.is_oversize(size)):
            return None
        if self.is_oversize(size) and fits[0][0] >= size + 20 * MIB:
            return None
        return fits[0][2:]

    def room(self, run: Run, piece: Piece) -> int:
        after = run.pieces[run.pieces.index(piece) + 1 :]
        return piece.size + (after[0].size if after and not after[0].is_mapped else 0)

    def obtain(self, size: int) -> tuple[Run, Piece] | None:
        make = self.grow if self.expandable else self.malloc
        found = make(size)
        if not found and self.release_oversize(size):
            found = make(size)
        if not found:
            self.empty_cache()
            self.retries += 1
            found = make(size)
        return found

    def fits_limit(self, more: int) -> bool:
        return self.limit is None or self.reserved + more <= self.limit

    def malloc(self, size: int) -> tuple[Run, Piece] | None:
        whole = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if not self.fits_limit(whole):
            return None
        address = self.runs[-1].pieces[-1].address + (1 << 40) if self.runs else 1 << 40
        piece = Piece(address, whole)
        self.runs.append(Run([piece], size <= MIB))
        return self.runs[-1], piece

    def grow(self, size: int) -> tuple[Run, Piece] | None:
        run = next(run for run in self.runs if run.is_small == (size <= MIB))
        start = next(piece.address for piece in run.pieces if self.can_start(run, piece, size))
        while True:
            piece = next(piece for piece in run.pieces if piece.address == start)
            if piece.is_mapped and piece.size >= size:
                return run, piece
            hole = run.pieces[run.pieces.index(piece) + 1] if piece.is_mapped else piece
            missing = min(size - (piece.size if piece.is_mapped else 0), hole.size)
            more = -(-missing // run.page) * run.page
            if not self.fits_limit(more):
                return None
            run.remap(hole.address, hole.address + more, True)

    def can_start(self, run: Run, piece: Piece, size: int) -> bool:
        row = run.pieces[run.pieces.index(piece) :]
        if piece.requested is not None or (piece.is_mapped and (len(row) < 2 or row[1].is_mapped)):
            return False
        total = 0
        for step in row:
            if step.requested is not None:
                break
            total += step.size
        return total >= size

    def release_oversize(self, size: int) -> bool:
        if self.max_split is None or self.expandable:
            return False
        target = max(size, self.max_split)
        whole = [run for run in self.runs if len(run.pieces) == 1 and run.pieces[0].is_free]
        cached = [run for run in whole if run.is_small == (size <= MIB) and self.is_oversize(run.pieces[0].size)]
        cached.sort(key=lambda run: (run.pieces[0].size, run.pieces[0].address))
        enough = [run for run in cached if run.pieces[0].size >= target]
        if enough:
            self.runs.remove(enough[0])
            return True
        released = 0
        while released < target and cached:
            released += cached[-1].pieces[0].size
            self.runs.remove(cached.pop())
        return released >= target

    def empty_cache(self) -> None:
        if not self.expandable:
            self.runs = [run for run in self.runs if len(run.pieces) > 1 or not run.pieces[0].is_free]
            return
        for run in self.runs:
            for piece in [piece for piece in run.pieces if piece.is_free]:
                first = -(-piece.address // run.page) * run.page
                last = (piece.address + piece.size) // run.page * run.page
                if first < last:
                    run.remap(first, last, False)

    def picture(self) -> list[tuple[str, list[tuple[int, int, bool]]]]:
        """Segments in order of address, with what their blocks hold."""
        segments = []
        for run in self.runs:
            row: list[tuple[int, int, bool]] = []
            for piece in (*run.pieces, Piece(0, 0, None, False)):
                if piece.is_mapped:
                    row.append((piece.size, piece.requested or 0, not piece.is_free))
                elif row:
                    segments.append(("small" if run.is_small else "large", row))
                    row = []
        return segments


def picture(allocator: CachingAllocator) -> list[tuple[str, list[tuple[int, int, bool]]]]:
    return [
        (segment.pool, [(block.size, block.requested, block.allocated) for block in segment.blocks])
        for segment in allocator.snapshot()
    ]


def sizes_of(allocator: CachingAllocator, pool: str = "large") -> list[list[int]]:
    """Segments of a pool as sizes of blocks in KiB, free ones negative."""
    return [
        [block.size // KIB * (1 if block.allocated else -1) for block in segment.blocks]
        for segment in allocator.snapshot()
        if segment.pool == pool
    ]


def holding(sizes: Iterable[float], **settings: int | bool) -> tuple[CachingAllocator, list[int]]:
    """An allocator with allocations of so many MiB, and their handles."""
    allocator = CachingAllocator(**settings)  # type: ignore[arg-type]
    return allocator, [allocator.allocate(int(size * MIB)) for size in sizes]


# Sizes on both sides of every rule; one trace uses few, so that blocks are reused.
SIZES = st.one_of(
    st.sampled_from((0, 1, 512, 513, MIB - 1, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB - 512, 10 * MIB, 11 * MIB)),
    st.integers(0, 2 * MIB),
    st.integers(1, 60).map(lambda number: number * MIB // 2),
    st.integers(1, 8).map(lambda number: number * 10 * MIB),
    st.integers(MIB, 70 * MIB),
)
# The sizes of a trace, and its steps: True and a number: allocate the size of that number; False: free that live one.
TRACES = st.tuples(
    st.lists(SIZES, min_size=1, max_size=5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 99)), min_size=25, max_size=90),
)
SETTINGS = st.fixed_dictionaries(
    {
        "limit_bytes": st.none() | st.integers(0, 250 * MIB),
        "expandable_segments": st.booleans(),
        "max_split_size_bytes": st.none() | st.integers(20, 60).map(lambda number: number * MIB),
    }
)
Trace = tuple[list[int], list[tuple[bool, int]]]
Settings = dict[str, int | None]


def events_of(trace: Trace) -> list[int]:
    sizes, steps = trace
    events: list[int] = []
    live: list[int] = []
    count = 0
    for is_new, number in steps:
        if is_new or not live:
            events.append(sizes[number % len(sizes)])
            live.append(count)
            count += 1
        else:
            events.append(~live.pop(number % len(live)))
    return events


def drive(allocator: CachingAllocator, events: Iterable[int]) -> None:
    for event in events:
        if event < 0:
            allocator.free(~event)
        else:
            allocator.allocate(event)


def make(settings: Settings) -> CachingAllocator:
    return CachingAllocator(**settings)  # type: ignore[arg-type]


def failure(action: Callable[[], object]) -> dict[str, int] | None:
    """The facts of the out-of-memory error that ends `action`; None: it ends well."""
    try:
        action()
    except OutOfMemory as error:
        return vars(error)
    return None


def check_structure(allocator: CachingAllocator) -> None:
    """Blocks tile their segment, free ones are merged, and the totals are sums of blocks and segments."""
    segments = allocator.snapshot()
    live = [block for segment in segments for block in segment.blocks if block.allocated]
    for segment in segments:
        at = segment.address
        for block in segment.blocks:
            assert (block.address, block.size % 512) == (at, 0)
            assert block.size > 0
            at += block.size
        assert at == segment.address + segment.size
        assert all(a.allocated or b.allocated for a, b in pairwise(segment.blocks))
        assert all(block.requested <= block.size for block in segment.blocks)
    for before, after in pairwise(segments):
        assert before.address + before.size < after.address
    assert allocator.allocated_bytes == sum(block.size for block in live)
    assert allocator.requested_bytes == sum(block.requested for block in live)
    assert allocator.reserved_bytes == sum(segment.size for segment in segments)


@settings(max_examples=300, deadline=None)
@given(TRACES, SETTINGS, st.sets(st.integers(0, 89), max_size=4))
def test_it_agrees_with_the_rules_told_slowly(trace: Trace, options: Settings, emptied: set[int]) -> None:
    allocator = make(options)
    slow = SlowAllocator(options["limit_bytes"], bool(options["expandable_segments"]), options["max_split_size_bytes"])
    for index, event in enumerate(events_of(trace)):
        if index in emptied:
            allocator.empty_cache()
            slow.empty_cache()
        if event < 0:
            slow.free(~event)
            allocator.free(~event)
        elif slow.allocate(event):
            assert allocator.allocate(event) == slow.count - 1
        else:
            with pytest.raises(OutOfMemory):
                allocator.allocate(event)
            break
        assert picture(allocator) == slow.picture()
    assert picture(allocator) == slow.picture()
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (slow.reserved, slow.allocated)
    assert allocator.num_alloc_retries == slow.retries


@settings(max_examples=150, deadline=None)
@given(TRACES, SETTINGS)
def test_blocks_tile_segments_and_totals_are_sums_and_peaks_are_maxima(trace: Trace, options: Settings) -> None:
    allocator = make(options)
    limit = options["limit_bytes"]
    most_allocated, most_reserved, first = 0, 0, None
    count = 0
    for event in events_of(trace):
        try:
            drive(allocator, [event])
        except OutOfMemory:
            break
        check_structure(allocator)
        count += event >= 0
        assert limit is None or allocator.reserved_bytes <= limit
        if allocator.allocated_bytes > most_allocated:
            most_allocated, first = allocator.allocated_bytes, count - 1
        most_reserved = max(most_reserved, allocator.reserved_bytes)
    assert (allocator.peak_allocated_bytes, allocator.peak_allocated_handle) == (most_allocated, first)
    if allocator.num_alloc_retries == 0:
        assert allocator.peak_reserved_bytes == most_reserved
    assert most_reserved <= allocator.peak_reserved_bytes <= (limit or 1 << 60)
    check_structure(allocator)


@settings(max_examples=150, deadline=None)
@given(TRACES, SETTINGS, st.integers(0, 60))
def test_replay_is_the_same_as_single_calls(trace: Trace, options: Settings, cut: int) -> None:
    events = events_of(trace)
    single, whole, halves = make(options), make(options), make(options)
    stopped = (
        failure(partial(drive, single, events)),
        failure(partial(whole.replay, events)),
        failure(partial(halves.replay, events[:cut])) or failure(partial(halves.replay, tuple(events[cut:]))),
    )
    assert stopped[0] == stopped[1] == stopped[2]
    for other in (whole, halves):
        assert vars(other) == vars(single)


@settings(max_examples=100, deadline=None)
@given(TRACES, SETTINGS)
def test_freeing_all_and_emptying_the_cache_leaves_nothing(trace: Trace, options: Settings) -> None:
    allocator = make(options)
    live: list[int] = []
    for event in events_of(trace):
        try:
            if event < 0:
                allocator.free(~event)
                live.remove(~event)
            else:
                live.append(allocator.allocate(event))
        except OutOfMemory:
            break
    for handle in live:
        allocator.free(handle)
    assert (allocator.allocated_bytes, allocator.requested_bytes, allocator.inactive_split_bytes) == (0, 0, 0)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0
    assert allocator.snapshot() == []


@settings(max_examples=150, deadline=None)
@given(TRACES, st.integers(0, 150 * MIB), st.booleans())
def test_out_of_memory_only_when_the_emptied_cache_cannot_serve(trace: Trace, limit: int, expandable: bool) -> None:
    allocator = CachingAllocator(limit_bytes=limit, expandable_segments=expandable)
    error = failure(partial(allocator.replay, events_of(trace)))
    if error is None:
        return
    size = -(-error["requested_bytes"] // 512) * 512
    pool, step = ("small", 2 * MIB) if size <= MIB else ("large", 20 * MIB)
    if size >= 10 * MIB and not expandable:
        step = 2 * MIB
    segments = allocator.snapshot()
    blocks = [block for segment in segments if segment.pool == pool for block in segment.blocks]
    assert error["free_bytes"] == limit - allocator.reserved_bytes < -(-size // step) * step
    assert allocator.num_alloc_retries >= 1
    assert all(block.allocated or block.size < size for block in blocks)
    assert all(any(block.allocated for block in segment.blocks) for segment in segments) or expandable


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (0, 0, 0),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB, 10 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),  # 1 MiB + 512 B are left: split off
        (11 * MIB, 12 * MIB, 12 * MIB),  # 1 MiB is left: handed out with it
        (12 * MIB + 1, 14 * MIB - (2 * MIB - 512), 14 * MIB),
    ],
)
def test_first_request_takes_a_rounded_block_of_a_rounded_segment(
    requested: int, allocated: int, reserved: int
) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(requested) == 0
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)
    assert allocator.requested_bytes == requested


@pytest.mark.parametrize(
    ("requested", "reserved"), [(1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB, 20), (20 * MIB, 20), (30 * MIB, 40)]
)
def test_expandable_segments_reserve_whole_pages_and_hand_out_exact_blocks(requested: int, reserved: int) -> None:
    allocator = CachingAllocator(expandable_segments=True)
    allocator.allocate(requested)
    assert allocator.allocated_bytes == -(-requested // 512) * 512
    assert allocator.reserved_bytes == reserved * MIB
    assert allocator.inactive_split_bytes == 0


def test_two_small_requests_share_a_segment_and_a_third_opens_another() -> None:
    allocator, _ = holding((0.75, 0.75, 0.75))
    assert sizes_of(allocator, "small") == [[768, 768, -512], [768, -1280]]
    assert allocator.inactive_split_bytes == 1792 * KIB


def test_one_cached_20_mib_segment_serves_two_9_mib_requests() -> None:
    allocator, (first, second) = holding((9, 9))
    assert sizes_of(allocator) == [[9 * KIB, 9 * KIB, -2 * KIB]]
    allocator.free(first)
    allocator.free(second)
    assert sizes_of(allocator) == [[-20 * KIB]]
    assert allocator.inactive_split_bytes == 0
    allocator.allocate(9 * MIB)
    allocator.allocate(9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_rest_of_1_mib_is_handed_out_in_the_large_pool() -> None:
    allocator, _ = holding((9, 10))
    assert sizes_of(allocator) == [[9 * KIB, 11 * KIB]]
    assert allocator.allocated_bytes == 20 * MIB
    assert allocator.requested_bytes == 19 * MIB


def test_the_smallest_free_block_that_fits_is_taken_and_of_equals_the_lowest() -> None:
    allocator, handles = holding((40, 12, 30, 12))
    for handle in handles:
        allocator.free(handle)
    allocator.allocate(12 * MIB)
    assert sizes_of(allocator) == [[-40 * KIB], [12 * KIB], [-30 * KIB], [-12 * KIB]]
    allocator.allocate(25 * MIB)
    assert sizes_of(allocator) == [[-40 * KIB], [12 * KIB], [25 * KIB, -5 * KIB], [-12 * KIB]]


def test_a_small_request_never_takes_a_large_block() -> None:
    allocator, (handle,) = holding((20,))
    allocator.free(handle)
    allocator.allocate(1)
    assert allocator.reserved_bytes == 22 * MIB


def test_a_freed_block_merges_with_both_neighbours() -> None:
    allocator, (first, second, third) = holding((4, 4, 4))
    allocator.free(first)
    allocator.free(third)
    assert sizes_of(allocator) == [[-4 * KIB, 4 * KIB, -12 * KIB]]
    assert allocator.inactive_split_bytes == 16 * MIB
    allocator.free(second)
    assert sizes_of(allocator) == [[-20 * KIB]]


def test_free_segments_are_given_back_before_the_limit_is_passed() -> None:
    allocator, (handle,) = holding((20,), limit_bytes=40 * MIB)
    allocator.free(handle)
    allocator.allocate(30 * MIB)
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (30 * MIB, 30 * MIB)
    assert allocator.num_alloc_retries == 1


def test_the_limit_holds_to_the_byte() -> None:
    allocator = CachingAllocator(limit_bytes=20 * MIB)
    allocator.allocate(5 * MIB)
    with pytest.raises(OutOfMemory):
        CachingAllocator(limit_bytes=20 * MIB - 1).allocate(5 * MIB)


def test_out_of_memory_tells_what_was_held() -> None:
    allocator, (_, idle) = holding((5, 12), limit_bytes=40 * MIB)
    allocator.free(idle)
    with pytest.raises(OutOfMemory, match="tried to allocate 31457280 bytes") as caught:
        allocator.allocate(30 * MIB)
    error = caught.value
    assert error.requested_bytes == 30 * MIB
    assert error.allocated_bytes == 5 * MIB
    assert error.reserved_bytes == 20 * MIB
    assert error.free_bytes == 20 * MIB
    assert error.limit_bytes == 40 * MIB
    assert allocator.allocate(18 * MIB) == 2  # the failed request took no handle, and what fits still does
    assert allocator.allocated_bytes == 23 * MIB


def test_scattered_free_memory_is_out_of_memory_and_expandable_segments_cure_it() -> None:
    for expandable in (False, True):
        allocator, handles = holding([12] * 10, limit_bytes=120 * MIB, expandable_segments=expandable)
        for handle in handles[:9]:
            allocator.free(handle)
        allocator.allocate(80 * MIB)
        assert allocator.num_alloc_retries == (0 if expandable else 1)
    fragmented, handles = holding([9] * 8, limit_bytes=80 * MIB)
    for handle in handles[::2]:
        fragmented.free(handle)
    with pytest.raises(OutOfMemory):
        fragmented.allocate(15 * MIB)  # 44 MiB are free, in pieces of 9 and 11


def test_an_expandable_segment_grows_by_what_its_free_tail_lacks() -> None:
    allocator, _ = holding((30, 15), expandable_segments=True)
    assert sizes_of(allocator) == [[30 * KIB, 15 * KIB, -15 * KIB]]
    assert allocator.reserved_bytes == 60 * MIB


def test_an_expandable_tail_is_the_last_choice() -> None:
    allocator, (first, _) = holding((12, 20), expandable_segments=True)
    allocator.free(first)
    allocator.allocate(8 * MIB)  # the tail's 8 MiB are the best fit, but the tail could grow
    assert sizes_of(allocator) == [[8 * KIB, -4 * KIB, 20 * KIB, -8 * KIB]]


def test_an_expandable_segment_gives_back_whole_free_pages_under_pressure() -> None:
    allocator, (first, _) = holding((40, 1.5), expandable_segments=True, limit_bytes=80 * MIB)
    allocator.free(first)
    allocator.allocate(50 * MIB)
    assert sizes_of(allocator) == [[1536, 50 * KIB, -8704]]
    assert allocator.num_alloc_retries == 1
    allocator.allocate(10 * MIB)  # the unmapped pages at the low end are used again, before the range grows
    assert sizes_of(allocator) == [[10 * KIB, -10 * KIB], [1536, 50 * KIB, -8704]]


def test_an_expandable_segment_keeps_the_pages_that_are_partly_in_use() -> None:
    allocator, (_, middle, _) = holding((30, 40, 1.5), expandable_segments=True)
    allocator.free(middle)
    allocator.empty_cache()
    assert sizes_of(allocator) == [[30 * KIB, -10 * KIB], [-10 * KIB, 1536, -8704]]
    assert allocator.reserved_bytes == 60 * MIB
    allocator.allocate(35 * MIB)  # 10 MiB free, a page mapped again, and 10 MiB free
    assert sizes_of(allocator) == [[30 * KIB, 35 * KIB, -5 * KIB, 1536, -8704]]
    assert allocator.reserved_bytes == 80 * MIB


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_neighbouring_unmapped_pages_count_as_one_room(order: tuple[int, int]) -> None:
    allocator, handles = holding((10, 10, 20, 20, 10, 35, 15), expandable_segments=True)
    allocator.free(handles[1])
    for index in order:
        allocator.free(handles[index])
        allocator.empty_cache()
    allocator.free(handles[5])
    allocator.allocate(8 * MIB)  # 10 MiB before 40 MiB of unmapped pages could grow to more than 35 MiB
    assert sizes_of(allocator) == [[10 * KIB, -10 * KIB], [10 * KIB, 8 * KIB, -27 * KIB, 15 * KIB]]


def test_max_split_size_has_nothing_to_give_back_of_an_expandable_segment() -> None:
    allocator, (handle,) = holding((40,), expandable_segments=True, max_split_size_bytes=20 * MIB, limit_bytes=60 * MIB)
    allocator.free(handle)
    with pytest.raises(OutOfMemory):
        allocator.allocate(70 * MIB)
    assert allocator.reserved_bytes == 0


def test_max_split_size_keeps_large_blocks_for_large_requests() -> None:
    allocator, (handle,) = holding((64,), max_split_size_bytes=40 * MIB)
    allocator.free(handle)
    allocator.allocate(30 * MIB)
    assert sizes_of(allocator) == [[-64 * KIB], [30 * KIB]]
    allocator.allocate(42 * MIB)  # 22 MiB less: too small for it
    assert sizes_of(allocator) == [[-64 * KIB], [30 * KIB], [42 * KIB]]
    allocator.allocate(50 * MIB)  # whole, not split
    assert sizes_of(allocator) == [[64 * KIB], [30 * KIB], [42 * KIB]]


def test_max_split_size_gives_back_one_large_block_rather_than_the_whole_cache() -> None:
    allocator, handles = holding((12, 50, 60), max_split_size_bytes=40 * MIB, limit_bytes=130 * MIB)
    for handle in handles:
        allocator.free(handle)
    allocator.allocate(30 * MIB)
    assert sizes_of(allocator) == [[-12 * KIB], [-60 * KIB], [30 * KIB]]
    assert allocator.num_alloc_retries == 0


def test_max_split_size_gives_back_several_large_blocks_for_one_larger() -> None:
    allocator, handles = holding((12, 40, 60), max_split_size_bytes=40 * MIB, limit_bytes=112 * MIB)
    for handle in handles:
        allocator.free(handle)
    allocator.allocate(100 * MIB)
    assert sizes_of(allocator) == [[-12 * KIB], [100 * KIB]]
    assert allocator.num_alloc_retries == 0


def test_max_split_size_is_compared_with_a_block_to_the_byte() -> None:
    for max_split, reserved in ((20 * MIB, 40 * MIB), (20 * MIB + 1, 20 * MIB)):
        allocator, (handle,) = holding((20,), max_split_size_bytes=max_split)
        allocator.free(handle)
        allocator.allocate(5 * MIB)
        assert allocator.reserved_bytes == reserved


def test_an_oversize_block_is_reused_up_to_20_mib_less() -> None:
    for requested, segments in ((44 * MIB, 2), (44 * MIB + 512, 1)):
        allocator, (handle,) = holding((64,), max_split_size_bytes=40 * MIB)
        allocator.free(handle)
        allocator.allocate(requested)
        assert len(allocator.snapshot()) == segments


def test_peaks_start_again_from_what_is_held() -> None:
    allocator, (first, _) = holding((30, 30))
    allocator.free(first)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (60 * MIB, 60 * MIB)
    assert allocator.peak_allocated_handle == 1
    allocator.reset_peaks()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (30 * MIB, 60 * MIB)
    allocator.allocate(1)
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (30 * MIB + 512, 62 * MIB)
    assert allocator.peak_allocated_handle == 2


def test_nothing_is_allocated_for_0_bytes_and_it_is_freed_once() -> None:
    allocator, (handle,) = holding((0,))
    assert allocator.snapshot() == []
    allocator.free(handle)
    with pytest.raises(ValueError, match="0 is not a live allocation"):
        allocator.free(handle)


@pytest.mark.parametrize("handle", [-1, 0, 2, 3])
def test_only_a_live_handle_can_be_freed(handle: int) -> None:
    allocator = CachingAllocator()
    allocator.replay([512, 512, ~0, 512, ~2])
    with pytest.raises(ValueError, match=f"{handle} is not a live allocation"):
        allocator.free(handle)
    assert allocator.allocated_bytes == 512


def test_what_came_before_a_bad_event_stands() -> None:
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="7 is not a live allocation"):
        allocator.replay([5 * MIB, ~7, 5 * MIB])
    assert allocator.allocated_bytes == allocator.peak_allocated_bytes == 5 * MIB
    assert allocator.allocate(1) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit_bytes": -1}, "found -1"), ({"max_split_size_bytes": 20 * MIB - 1}, "at least 20 MiB")],
)
def test_impossible_settings_are_refused(options: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(options)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, found -512"):
        CachingAllocator().allocate(-512)
