"""What one observation changes in a belief about memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.search.belief import GPU_DOUBT, MemoryBelief
from autotune.search.climb import Observation
from autotune.search.remember import STUCK, needed_bytes, remember
from autotune.values import GIB, MIB, Prediction
from tests.tiny import a_config

CONFIG = a_config(sequence_length=1024, micro_batch_size=4)
EXPECTED = Prediction(
    peak_allocated_bytes=8 * GIB,
    training_peak_allocated_bytes=7 * GIB,
    peak_reserved_bytes=10 * GIB,
    device_used_bytes=11 * GIB,
)
BESIDE = 1 * GIB + STUCK * 2 * GIB  # the context, and what of the cache is stuck


def a_belief() -> MemoryBelief:
    return MemoryBelief(GPU_DOUBT, 9 * GIB)


def seen(**changes: object) -> Observation:
    fits = Observation(CONFIG, fits=True, out_of_memory=False, tokens_per_second=1.0, spread=None, peak_bytes=7 * GIB)
    return replace(fits, **changes)  # type: ignore[arg-type]


OUT = seen(fits=False, out_of_memory=True, tokens_per_second=None, peak_bytes=None)


def believed(memory: MemoryBelief) -> float:
    """GiB that the config's training is believed to need."""
    return memory.needs(CONFIG, 7 * GIB + BESIDE, 7 * GIB)[0] / GIB


def test_what_is_needed_is_all_but_the_cache_that_can_be_given_back() -> None:
    assert needed_bytes(EXPECTED) == 8 * GIB + BESIDE
    assert needed_bytes(replace(EXPECTED, device_used_bytes=None)) == 8 * GIB
    assert needed_bytes(replace(EXPECTED, peak_reserved_bytes=8 * GIB, device_used_bytes=9 * GIB)) == 9 * GIB


@pytest.mark.parametrize("peak_gib", [6.5, 7.5])
def test_a_peak_moves_the_belief_towards_it(peak_gib: float) -> None:
    memory = a_belief()
    remember(memory, EXPECTED, seen(peak_bytes=int(peak_gib * GIB)), on_cpu=False)
    assert believed(memory) == pytest.approx(peak_gib + BESIDE / GIB, abs=0.06)


def test_what_was_held_against_the_limit_counts_where_it_is_known() -> None:
    memory = a_belief()
    remember(memory, EXPECTED, seen(needed_bytes=9 * GIB), on_cpu=True)
    assert believed(memory) == pytest.approx(9.0, abs=0.1)


def test_what_ran_out_needs_more_than_is_allowed() -> None:
    memory = a_belief()
    remember(memory, EXPECTED, OUT, on_cpu=False)
    assert believed(memory) > 8.9


@pytest.mark.parametrize("on_cpu", [False, True])
def test_what_it_asked_for_bounds_it_further_and_on_a_card_the_rest_comes_on_top(on_cpu: bool) -> None:
    plain, further = a_belief(), a_belief()
    remember(plain, EXPECTED, OUT, on_cpu=on_cpu)
    wanted = 9 * GIB + 300 * MIB - (0 if on_cpu else int(BESIDE))
    remember(further, EXPECTED, replace(OUT, wanted_bytes=wanted), on_cpu=on_cpu)
    assert believed(further) > believed(plain)


def test_what_was_not_probed_teaches_nothing() -> None:
    memory = a_belief()
    remember(memory, EXPECTED, replace(OUT, probed=False), on_cpu=False)
    assert believed(memory) == believed(a_belief())


def test_a_cache_smaller_than_expected_is_learned() -> None:
    memory = a_belief()
    remember(memory, EXPECTED, seen(reserved_bytes=7 * GIB), on_cpu=False)
    assert memory.cache < 0.5 < a_belief().cache
