"""When a probe stops timing: beaten, long enough, or steady."""

from __future__ import annotations

import pytest

from autotune.probe.race import is_beaten, is_enough, round_means


@pytest.mark.parametrize(
    ("times", "beat_s", "beaten"),
    [
        ((), 1.0, False),
        ((9.0,), None, False),
        ((2.9,), 1.0, False),  # one may have been disturbed
        ((3.1,), 1.0, True),
        ((1.5, 1.2), 1.0, True),
        ((1.5, 1.0), 1.0, False),
        ((1.11, 1.12, 1.2), 1.0, True),
        ((1.11, 1.12, 1.05), 1.0, False),
    ],
)
def test_a_probe_is_beaten_by_its_quickest_or_at_once(
    times: tuple[float, ...], beat_s: float | None, beaten: bool
) -> None:
    assert is_beaten(times, beat_s) is beaten


@pytest.mark.parametrize(
    ("times", "enough"),
    [
        ((), False),
        ((12.1,), False),
        ((12.1, 12.9), True),
        ((12.1, 19.0), False),  # one of them was disturbed
        ((12.1, 19.0, 12.2), True),
        ((3.9, 3.8), False),
        ((3.0, 3.1, 3.3), True),
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
    assert is_beaten(short_first, 0.13, 4)
    assert not is_beaten(short_first, 0.14, 4)
    assert not is_enough((3.0, 3.0, 3.0), 4)
    assert is_enough((3.0, 3.0, 3.0, 3.0), 4)
    assert not is_enough((*short_first, 0.1), 4)
