"""Which GPUs CUDA shows a process, and in which order.

A `Device.index` is a position in this list: what torch calls `cuda:N` in a worker that inherits this process's
CUDA_VISIBLE_DEVICES and runs with CUDA_DEVICE_ORDER=PCI_BUS_ID. Without the latter CUDA counts the fastest card
first, and every index here would be wrong: give a worker `WORKER_ENVIRONMENT`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

#: What a worker's environment must say for `Device.index` to hold.
WORKER_ENVIRONMENT = MappingProxyType({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})

_ORDINAL = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as CUDA counts it. One in MIG mode shows only its slices."""

    uuid: str | None
    slices: tuple[str | None, ...] | None = None  # UUIDs; None: not in MIG mode


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a visible device is: a card's position in PCI order, and a slice's in it."""

    card: int
    slice: int | None = None


def visible_places(cards: Sequence[Card], value: str | None) -> list[Place]:
    """The places that CUDA enumerates, in its order, for a CUDA_VISIBLE_DEVICES of `value` (None: not set).

    As documented in the CUDA programming guide ("CUDA environment variables"): ordinals, UUIDs and unambiguous
    UUID prefixes; the first invalid entry ends the list, a repeated one empties it. Of all MIG slices a process
    sees one: the first (MIG user guide, "CUDA device enumeration").
    """
    if value is None:
        listed: list[Place | None] = [_whole(cards, number) for number in range(len(cards))]
        return _one_slice([place for place in listed if place is not None])
    kind = value.strip()[:4]  # a list holds one kind of entry: another kind is invalid in it
    places: list[Place] = []
    for entry in value.split(","):
        place = _place(cards, entry.strip(), kind)
        if place is None:
            break
        if place in places:
            return []
        places.append(place)
    return _one_slice(places)


def _place(cards: Sequence[Card], entry: str, kind: str) -> Place | None:
    if kind in ("GPU-", "MIG-"):
        return _by_uuid(cards, entry) if entry.startswith(kind) else None
    match = _ORDINAL.match(entry)  # as strtoul does: "1gpu" is 1
    return _whole(cards, int(match[0])) if match else None


def _whole(cards: Sequence[Card], number: int) -> Place | None:
    """The card of that number, or its first slice; None where there is none."""
    if not 0 <= number < len(cards):
        return None
    slices = cards[number].slices
    if slices is None:
        return Place(number)
    return Place(number, 0) if slices else None


def _by_uuid(cards: Sequence[Card], prefix: str) -> Place | None:
    found: list[Place] = []
    for number, card in enumerate(cards):
        if card.uuid and card.uuid.startswith(prefix) and (place := _whole(cards, number)):
            found.append(place)
        for position, uuid in enumerate(card.slices or ()):
            if uuid and uuid.startswith(prefix):
                found.append(Place(number, position))
    return found[0] if len(found) == 1 else None


def _one_slice(places: Sequence[Place]) -> list[Place]:
    first = next((place for place in places if place.slice is not None), None)
    return [place for place in places if place.slice is None or place == first]
