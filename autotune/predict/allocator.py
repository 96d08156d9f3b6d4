"""PyTorch's CUDA caching allocator, simulated: allocations and frees in order to allocated and reserved bytes.

The rules are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (torch 2.13), for one device
and one stream; streams of their own, CUDA graphs' pools and `garbage_collection_threshold` are not modelled.

Two things differ from a card. Addresses: where cudaMalloc puts a segment is not known, so each new segment lies above
all earlier ones; addresses only break ties between free blocks of one size. The limit: `limit_bytes` is what the
device can give in all, which for expandable segments is the pages mapped (`set_per_process_memory_fraction` compares
the size of a segment that it then does not make). A range of expandable segments never runs out of addresses here; on
a card it has 9/8 of its memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

# Every block begins and ends on a multiple of 512 B, so inside all sizes and addresses are counted in units of 512 B.
_UNIT_BITS = 9
_MIB = 1 << (20 - _UNIT_BITS)
_SMALL_REQUEST = _MIB  # up to this a request belongs to the small pool; that pool's live blocks are no larger either
_SMALL_SEGMENT = 2 * _MIB  # a segment of the small pool, and its page
_LARGE_SEGMENT = 20 * _MIB  # a segment for requests under 10 MiB, and the large pool's page
_OWN_SEGMENT = 10 * _MIB  # from here on a request gets a segment of its own, in multiples of 2 MiB
_ROUND_SEGMENT = 2 * _MIB
_UNSPLIT_REST = _MIB  # the large pool splits a block only where more than this would be left
_OVERSIZE_SLACK = 20 * _MIB  # with max_split_size: an oversize block serves what is smaller by less than this
_UNLIMITED = 1 << 60

# A free block is one integer, size above address, so a sorted list of them is in best-fit order.
_ADDRESS_BITS = 40
_ADDRESSES = 1 << _ADDRESS_BITS  # 512 TiB
_ADDRESS_MASK = _ADDRESSES - 1
_SMALL_BASE = _LARGE_SEGMENT  # where addresses begin: on a page of either pool, and low, since small integers are quick
_LARGE_BASE = _LARGE_SEGMENT << 14  # 320 GiB: above any card's small pool
_GAP = _LARGE_SEGMENT  # between segments, so that blocks of two segments never touch
_SMALL_RANGE = (_SMALL_BASE, _LARGE_BASE - _GAP, _SMALL_SEGMENT)  # expandable segments: first address, end, page
_LARGE_RANGE = (_LARGE_BASE, _ADDRESSES, _LARGE_SEGMENT)
_FREED = -1


class OutOfMemory(Exception):
    """A request that does not fit the limit even after every wholly free segment was given back. All in bytes.

    `requested_bytes` is what was asked for, `free_bytes` what of the limit was not reserved.
    """

    def __init__(
        self, *, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, free_bytes: int, limit_bytes: int
    ) -> None:
        super().__init__(
            f"tried to allocate {requested_bytes} bytes; of the {limit_bytes} allowed {reserved_bytes} are reserved "
            f"and {allocated_bytes} allocated"
        )
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.free_bytes = free_bytes
        self.limit_bytes = limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A piece of a segment, in bytes: handed out, or free (`requested` is 0 then)."""

    address: int
    size: int
    requested: int
    allocated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Reserved memory in one piece, in bytes: a cudaMalloc, or the pages of an expandable segment without a gap."""

    address: int
    size: int
    pool: Literal["small", "large"]
    blocks: tuple[Block, ...]


class CachingAllocator:
    """The caching allocator of one device, as an object to drive.

    `limit_bytes` bounds what it reserves (None: no bound). `expandable_segments` and `max_split_size_bytes` are the
    settings of those names in PYTORCH_ALLOC_CONF. Raises ValueError for a negative limit, and for a
    `max_split_size_bytes` under 20 MiB, which PyTorch refuses too. OverflowError where 512 TiB of addresses run out.
    """

    def __init__(
        self,
        *,
        limit_bytes: int | None = None,
        expandable_segments: bool = False,
        max_split_size_bytes: int | None = None,
    ) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes must not be negative, found {limit_bytes}")
        if max_split_size_bytes is not None and max_split_size_bytes < _LARGE_SEGMENT << _UNIT_BITS:
            raise ValueError(f"max_split_size_bytes must be at least 20 MiB, found {max_split_size_bytes}")
        self._limit_bytes = limit_bytes
        self._limit = _UNLIMITED if limit_bytes is None else limit_bytes >> _UNIT_BITS
        self._expandable = expandable_segments
        self._max_split = _UNLIMITED if max_split_size_bytes is None else -(-max_split_size_bytes >> _UNIT_BITS)
        self._allocated = self._peak_allocated = self._reserved = self._peak_reserved = 0
        self._peak_handle: int | None = None
        self._retries = 0
        # By handle: the size of its block (0: no memory was asked for), where it is, and the bytes asked for.
        self._sizes: list[int] = []
        self._addresses: list[int] = []
        self._requested: list[int] = []
        # Free blocks: in best-fit order by pool, and by where they start and end.
        self._small: list[int] = []
        self._large: list[int] = []
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._segments: dict[int, int] = {}  # address → size; none with expandable segments
        self._next_address = _SMALL_BASE
        self._holes: dict[int, int] = {}  # address → size of the pages not mapped; only with expandable segments
        if expandable_segments:
            self._holes = {base: end - base for base, end, _ in (_SMALL_RANGE, _LARGE_RANGE)}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the blocks in use: requests rounded up, with what was not worth splitting off."""
        return self._allocated << _UNIT_BITS

    @property
    def peak_allocated_bytes(self) -> int:
        """The most `allocated_bytes` since the start or `reset_peaks`."""
        return self._peak_allocated << _UNIT_BITS

    @property
    def peak_allocated_handle(self) -> int | None:
        """The allocation that brought `peak_allocated_bytes` about first; None: none since `reset_peaks`."""
        return self._peak_handle

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the segments: what the device has given."""
        return self._reserved << _UNIT_BITS

    @property
    def peak_reserved_bytes(self) -> int:
        """The most `reserved_bytes` since the start or `reset_peaks`."""
        return self._peak_reserved << _UNIT_BITS

    @property
    def requested_bytes(self) -> int:
        """Bytes that the allocations in use asked for (adds them up)."""
        return sum(asked for asked, size in zip(self._requested, self._sizes, strict=True) if size > 0)

    @property
    def inactive_split_bytes(self) -> int:
        """Free bytes of segments that are partly in use; as in PyTorch, 0 with expandable segments."""
        if self._expandable:
            return 0
        free = ((key & _ADDRESS_MASK, key >> _ADDRESS_BITS) for key in self._small + self._large)
        return sum(size for address, size in free if self._segments.get(address) != size) << _UNIT_BITS

    @property
    def num_alloc_retries(self) -> int:
        """How often the cache was emptied because the device had no more to give."""
        return self._retries

    def reset_peaks(self) -> None:
        """Both peaks start again from what is allocated and reserved now."""
        self._peak_allocated, self._peak_reserved, self._peak_handle = self._allocated, self._reserved, None

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes and give its handle: 0, 1, 2, … in order. 0 bytes take no memory.

        Raises OutOfMemory, which takes no handle, and ValueError for a negative size.
        """
        if size < 0:
            raise ValueError(f"a size must not be negative, found {size}")
        self.replay((size,))
        return len(self._sizes) - 1

    def free(self, handle: int) -> None:
        """Free an allocation. Raises ValueError for a handle that is not live."""
        if handle < 0:
            raise ValueError(f"{handle} is not a live allocation")
        self.replay((~handle,))

    def empty_cache(self) -> None:
        """Give the device back every segment (every page of an expandable one) that holds nothing."""
        for free in (self._large, self._small):
            for key in tuple(free):
                address, size = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
                if self._expandable:
                    self._unmap(free, address, size)
                elif self._segments.get(address) == size:
                    self._release(free, key)

    def replay(self, events: Sequence[int]) -> None:
        """Allocate and free in the order of `events`, as `allocate` and `free` would (they are this).

        An event n ≥ 0 allocates n bytes and has the next handle; an event ~handle (that is, −1 − handle) frees that
        allocation. Raises OutOfMemory and ValueError (a handle that is not live); what came before the event stands.
        """
        small, large, starts, ends = self._small, self._large, self._starts, self._ends
        sizes, addresses, requested = self._sizes, self._addresses, self._requested
        allocated, peak, peak_handle = self._allocated, self._peak_allocated, self._peak_handle
        is_plain = not self._expandable and self._max_split == _UNLIMITED
        unsplit_rest = 0 if self._expandable else _UNSPLIT_REST
        split_below = _UNLIMITED if self._expandable else self._max_split
        small_request, bits, mask = _SMALL_REQUEST, _ADDRESS_BITS, _ADDRESS_MASK  # locals are quicker to read
        try:
            for event in events:
                if event > 0:
                    size = (event + 511) >> 9  # whole units
                    if size <= small_request:
                        free, smallest_rest = small, 0
                    else:
                        free, smallest_rest = large, unsplit_rest
                    index = bisect_left(free, size << bits)
                    if not is_plain:
                        index = self._choose(free, index, size)
                    if index == len(free):
                        self._allocated = allocated
                        index = bisect_left(free, self._grow(free, size, event))
                    key = free[index]
                    address = key & mask
                    whole = key >> bits
                    rest = whole - size
                    del starts[address]
                    if rest > smallest_rest and size < split_below:
                        after = address + size
                        key = rest << bits | after
                        starts[after] = ends[after + rest] = key
                        if index and free[index - 1] > key:
                            del free[index]
                            insort(free, key)
                        else:
                            free[index] = key
                    else:
                        size = whole
                        del free[index], ends[address + size]
                    sizes.append(size)
                    addresses.append(address)
                    requested.append(event)
                    allocated += size
                    if allocated > peak:
                        peak = allocated
                        peak_handle = len(sizes) - 1
                elif event < 0:
                    size = sizes[~event]
                    if size == _FREED:
                        raise ValueError(f"{~event} is not a live allocation")
                    sizes[~event] = _FREED
                    if not size:
                        continue
                    address = addresses[~event]
                    allocated -= size
                    free = small if size <= small_request else large
                    end = address + size
                    if end in starts:
                        key = starts.pop(end)
                        del free[bisect_left(free, key)]
                        rest = key >> bits
                        size += rest
                        end += rest
                    if address in ends:
                        key = ends.pop(address)
                        del free[bisect_left(free, key)]
                        rest = key >> bits
                        size += rest
                        address -= rest
                    key = size << bits | address
                    starts[address] = ends[end] = key
                    insort(free, key)
                else:
                    sizes.append(0)
                    addresses.append(0)
                    requested.append(0)
        except IndexError:
            raise ValueError(f"{~event} is not a live allocation") from None
        finally:
            self._allocated, self._peak_allocated, self._peak_handle = allocated, peak, peak_handle

    def snapshot(self) -> list[Segment]:
        """Every segment and its blocks, by address."""
        blocks = sorted(self._blocks(), key=attrgetter("address"))
        segments = []
        for start, stop, is_small in sorted(self._ranges()):
            first, last = (bisect_left(blocks, edge, key=attrgetter("address")) for edge in (start, stop))
            pool: Literal["small", "large"] = "small" if is_small else "large"
            segments.append(Segment(address=start, size=stop - start, pool=pool, blocks=tuple(blocks[first:last])))
        return segments

    def _blocks(self) -> Iterator[Block]:
        """Every block, live ones first."""
        for address, size, requested in zip(self._addresses, self._sizes, self._requested, strict=True):
            if size > 0:
                yield _block(address, size, requested)
        for key in self._small + self._large:
            yield _block(key & _ADDRESS_MASK, key >> _ADDRESS_BITS, None)

    def _ranges(self) -> Iterator[tuple[int, int, bool]]:
        """Of every segment its first byte, the byte after its last, and whether it is the small pool's."""
        for address, size in self._segments.items():
            yield address << _UNIT_BITS, address + size << _UNIT_BITS, size == _SMALL_SEGMENT
        for base, end, page in (_SMALL_RANGE, _LARGE_RANGE):
            at = base
            for hole in sorted(hole for hole in self._holes if base <= hole < end):
                if hole > at:
                    yield at << _UNIT_BITS, hole << _UNIT_BITS, page == _SMALL_SEGMENT
                at = hole + self._holes[hole]

    def _choose(self, free: list[int], index: int, size: int) -> int:
        """The free block for `size` where settings make it another than the best fit at `index`; none: the length."""
        if index == len(free):
            return index
        if self._expandable:
            while index + 1 < len(free) and self._room(free[index + 1]) < self._room(free[index]):
                index += 1
        whole = free[index] >> _ADDRESS_BITS
        if size < self._max_split:
            return index if whole < self._max_split else len(free)
        return index if whole < size + _OVERSIZE_SLACK else len(free)

    def _room(self, key: int) -> int:
        """What a free block of an expandable segment could grow to with the unmapped pages behind it."""
        size = key >> _ADDRESS_BITS
        return size + self._holes.get((key & _ADDRESS_MASK) + size, 0)

    def _grow(self, free: list[int], size: int, requested_bytes: int) -> int:
        """A free block for `size` from the device, in the order in which PyTorch tries. Raises OutOfMemory."""
        obtain = self._map if self._expandable else self._new_segment
        key = obtain(free, size)
        if key is None and self._release_oversize(free, size):
            key = obtain(free, size)
        if key is None:
            self.empty_cache()
            self._retries += 1
            key = obtain(free, size)
        if key is None:
            limit_bytes = self._limit_bytes or 0
            raise OutOfMemory(
                requested_bytes=requested_bytes,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                free_bytes=limit_bytes - self.reserved_bytes,
                limit_bytes=limit_bytes,
            )
        return key

    def _new_segment(self, free: list[int], size: int) -> int | None:
        """A segment of its own as one free block, or None where the limit forbids it."""
        if size <= _SMALL_REQUEST:
            whole = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            whole = _LARGE_SEGMENT
        else:
            whole = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        if self._reserved + whole > self._limit:
            return None
        address = self._next_address
        if address + whole > _ADDRESSES:
            raise OverflowError("more than 512 TiB were reserved over this allocator's life")
        self._next_address += whole + _GAP
        self._segments[address] = whole
        self._reserve(whole)
        return self._insert(free, address, whole)

    def _map(self, free: list[int], size: int) -> int | None:
        """A free block of at least `size` at the lowest address where mapping pages makes one, or None at the limit.

        What was mapped before the limit was met stays mapped.
        """
        base, end, page = self._range(free)
        address = self._lowest_room(base, end, size)
        while True:
            key = self._starts.get(address, 0)
            whole = key >> _ADDRESS_BITS
            if whole >= size:
                return key
            hole = address + whole
            room = self._holes[hole]
            mapped = -(-min(size - whole, room) // page) * page
            if self._reserved + mapped > self._limit:
                return None
            del self._holes[hole]
            if mapped < room:
                self._holes[hole + mapped] = room - mapped
            self._reserve(mapped)
            self._insert(free, hole, mapped)

    def _range(self, free: list[int]) -> tuple[int, int, int]:
        return _SMALL_RANGE if free is self._small else _LARGE_RANGE

    def _lowest_room(self, base: int, end: int, size: int) -> int:
        """The lowest address of free blocks and unmapped pages in a row, at least one of these, that hold `size`."""
        for hole in sorted(hole for hole in self._holes if base <= hole < end):
            start = at = self._ends[hole] & _ADDRESS_MASK if hole in self._ends else hole
            while at < start + size:
                step = self._holes.get(at) or self._starts.get(at, 0) >> _ADDRESS_BITS
                if not step:
                    break
                at += step
            else:
                return start
        raise OverflowError(f"an expandable segment has no room for {size << _UNIT_BITS} bytes")

    def _unmap(self, free: list[int], address: int, size: int) -> None:
        """Give back the whole pages inside a free block; what it holds of other pages stays free."""
        page, end = self._range(free)[2], address + size
        first, last = -(-address // page) * page, end // page * page
        if first >= last:
            return
        self._remove(free, size << _ADDRESS_BITS | address)
        for start, stop in ((address, first), (last, end)):
            if start < stop:
                self._insert(free, start, stop - start)
        self._reserved -= last - first
        before = next((hole for hole, room in self._holes.items() if hole + room == first), None)
        start = first if before is None else before
        self._holes[start] = last - start + self._holes.pop(last, 0)

    def _release_oversize(self, free: list[int], size: int) -> bool:
        """With max_split_size: give back the oversize segment that fits `size`, else the largest until as much is free.

        False where that is not enough; what was given back stays given back.
        """
        if self._max_split == _UNLIMITED or self._expandable:
            return False
        target = max(size, self._max_split)
        index = bisect_left(free, target << _ADDRESS_BITS)
        if index < len(free):
            self._release(free, free[index])
            return True
        released = 0
        while released < target and free and free[-1] >> _ADDRESS_BITS >= self._max_split:
            released += free[-1] >> _ADDRESS_BITS
            self._release(free, free[-1])
        return released >= target

    def _release(self, free: list[int], key: int) -> None:
        """Give a wholly free segment back to the device."""
        self._remove(free, key)
        self._reserved -= self._segments.pop(key & _ADDRESS_MASK)

    def _reserve(self, size: int) -> None:
        self._reserved += size
        self._peak_reserved = max(self._peak_reserved, self._reserved)

    def _insert(self, free: list[int], address: int, size: int) -> int:
        """Add a free block, merged with the free blocks beside it."""
        for neighbour in (self._ends.get(address), self._starts.get(address + size)):
            if neighbour is not None:
                self._remove(free, neighbour)
                address = min(address, neighbour & _ADDRESS_MASK)
                size += neighbour >> _ADDRESS_BITS
        key = size << _ADDRESS_BITS | address
        self._starts[address] = self._ends[address + size] = key
        insort(free, key)
        return key

    def _remove(self, free: list[int], key: int) -> None:
        address, size = key & _ADDRESS_MASK, key >> _ADDRESS_BITS
        del free[bisect_left(free, key)], self._starts[address], self._ends[address + size]


def _block(address: int, size: int, requested: int | None) -> Block:
    """Units to bytes; None requested: free."""
    return Block(
        address=address << _UNIT_BITS,
        size=size << _UNIT_BITS,
        requested=requested or 0,
        allocated=requested is not None,
    )
