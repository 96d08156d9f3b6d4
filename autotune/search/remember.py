"""What an observation teaches of memory: what fits says what it took, what ran out that it takes more. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autotune.values import Prediction

if TYPE_CHECKING:  # a supervisor asks for `needed_bytes` alone, and numpy takes 20 MiB
    from autotune.search.belief import MemoryBelief
    from autotune.search.climb import Observation

STUCK = 0.1  # of what is kept beside tensors, that lies between them and cannot be given back
_LEAST_CACHE = 0.01  # of the tensors, that the allocator has to be expected to keep beside them to learn from it


def remember(memory: MemoryBelief, expected: Prediction, observation: Observation, *, on_cpu: bool) -> None:
    """Put an observation into the belief, beside what was expected of its config with nothing learned.

    A probe does not evaluate, so training alone is compared. What was not probed teaches nothing.
    """
    config = observation.config
    training = expected.training_peak_allocated_bytes or expected.peak_allocated_bytes
    beside = needed_bytes(expected) - expected.peak_allocated_bytes
    needed = training + beside
    if observation.fits and observation.peak_bytes:
        measured = observation.needed_bytes or observation.peak_bytes + beside
        memory.observe(config, needed, training, measured)
        cached = (expected.peak_reserved_bytes or 0) - expected.peak_allocated_bytes
        if observation.reserved_bytes and cached > _LEAST_CACHE * expected.peak_allocated_bytes:
            memory.observe_cache((observation.reserved_bytes - observation.peak_bytes) / cached)
    elif observation.out_of_memory and observation.probed:
        wanted = (observation.wanted_bytes or 0) + (0.0 if on_cpu else beside)
        memory.observe_at_least(config, needed, training, max(memory.allowed_bytes, wanted))


def needed_bytes(expected: Prediction) -> float:
    """What a whole run cannot do without, on the device: tensors and what none shows; cached memory is given back."""
    if expected.device_used_bytes is None or expected.peak_reserved_bytes is None:
        return float(expected.peak_allocated_bytes)
    cached = max(0, expected.peak_reserved_bytes - expected.peak_allocated_bytes)
    return expected.device_used_bytes - (1 - STUCK) * cached
