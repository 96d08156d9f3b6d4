"""A memory limit for a command that is not ours: what its environment and its kernel limits must say.

A CPU run gets an absolute soft `RLIMIT_DATA` (set by the keeper): past it torch's own allocation error is raised.
A CUDA or ROCm run gets `per_process_memory_fraction` through the allocator's variable. torch knows that key from 2.10
on (pytorch PR 161035); an older one refuses to start with it ("Unrecognized key"), so `needs_torch` is to be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from autotune.errors import InvalidRequest
from autotune.hardware.cards import cards
from autotune.hardware.sizes import format_bytes
from autotune.predict.context import Context, context_of, context_of_capability
from autotune.recover.watching import AttemptLimits
from autotune.values import Device

NEEDS_TORCH = (2, 10)
#: torch reads the first that is set of the older names and PYTORCH_ALLOC_CONF, and which goes first has changed: both.
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_KEY = "per_process_memory_fraction"


def with_memory_limit(limits: AttemptLimits, limit_bytes: int | None, device: Device) -> AttemptLimits:
    """The limits of an attempt on `device` that may take `limit_bytes` of it (None: all of it).

    On a GPU the limit is of the whole process, so the context is taken off before the allocator gets the rest. Raises
    `InvalidRequest` where nothing is left.
    """
    if device.kind == "cpu":
        return replace(limits, data_bytes=limit_bytes)
    context = context_of_device(device)
    limits = replace(limits, context_bytes=context.likely_bytes)
    if limit_bytes is None:
        return limits
    if device.total_bytes is None or limit_bytes <= context.likely_bytes:
        raise InvalidRequest(
            f"--memory-limit {format_bytes(limit_bytes)} leaves nothing beside the CUDA context"
            f" ({format_bytes(context.likely_bytes)}) on {device.name}: give more"
        )
    return replace(limits, memory_fraction=min(1.0, (limit_bytes - context.likely_bytes) / device.total_bytes))


def context_of_device(device: Device) -> Context:
    """As of the card of that name in the catalogue, or of its architecture."""
    card = next((card for card in cards() if card.name == device.name), None)
    return context_of(card) if card is not None else context_of_capability(device.compute_capability)


def needs_torch(torch: str | None) -> str | None:
    """A sentence where a torch of this version cannot be limited on a GPU; None where it can, or is not known."""
    found = re.match(r"(\d+)\.(\d+)", torch or "")
    if found is None or (int(found[1]), int(found[2])) >= NEEDS_TORCH:
        return None
    return (
        f"--memory-limit on a GPU needs torch {'.'.join(map(str, NEEDS_TORCH))} or newer in the trainer's environment,"
        f" which has {torch}: upgrade it, or leave --memory-limit out"
    )


def fraction_environment(environ: Mapping[str, str], fraction: float | None) -> dict[str, str]:
    """What to add to `environ` so that each process's allocator takes at most `fraction` of a card.

    Settings that are there already are kept.
    """
    if fraction is None:
        return {}
    stated = next((environ[name] for name in _VARIABLES if environ.get(name)), "")
    kept = [part for part in _parts(stated) if part.partition(":")[0].strip() != _KEY]
    value = ",".join([*kept, f"{_KEY}:{fraction:.6f}"])
    return dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), value)


def _parts(stated: str) -> list[str]:
    """Settings of an allocator variable; commas inside brackets part nothing (`roundup_power2_divisions:[256:1,…]`)."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", stated) if part.strip()]
