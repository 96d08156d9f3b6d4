"""When a probe stops timing: beaten, long enough, or steady."""

from __future__ import annotations

import pytest

from autotune.probe.race import is_beaten, is_enough, round_means


@pytest.mark.parametrize(
    ("times", "beat_s", "beaten"),
    [
        ((), 1.0, False),
        ((9.0,), None, False),
        ((1.5,), 1.0, False),
        ((1.51,), 1.0, True),
        ((1.5, 1.0), 1.0, True),
        ((1.2, 1.0), 1.0, False),
        ((1.5, 1.0, 1.05), 1.0, False),  # the first was noise
        ((1.11, 1.12, 0.5), 1.0, True),
    ],
)
def test_a_probe_is_beaten_by_its_median_or_at_once(
    times: tuple[float, ...], beat_s: float | None, beaten: bool
) -> None:
    assert is_beaten(times, beat_s) is beaten


@pytest.mark.parametrize(
    ("times", "enough"),
    [
        ((), False),
        ((12.1,), True),
        ((4.1,), False),
        ((4.1, 4.6), True),
        ((3.9, 4.6), False),
        ((2.0, 2.1, 2.2), True),
        ((1.0, 1.0), False),  # two that agree may do so by chance
        ((1.0, 1.004, 1.001), True),
        ((1.0, 1.02, 1.001), False),
    ],
)
def test_times_are_enough_when_long_or_steady(times: tuple[float, ...], enough: bool) -> None:
    assert is_enough(times) is enough


def test_only_whole_rounds_of_lengths_are_compared() -> None:
    short_first = (0.1, 0.2, 0.3, 1.0)
    assert round_means((*short_first, 0.1), 4) == pytest.approx([0.4])
    assert not is_beaten((3.0, 3.0, 3.0), 0.5, 4)
    assert is_beaten(short_first, 0.25, 4)
    assert not is_beaten(short_first, 0.35, 4)
    assert not is_enough((2.0, 2.0, 2.0), 4)
    assert is_enough((2.0, 2.0, 2.0, 2.0), 4)
    assert not is_enough((*short_first, 0.1), 4)
