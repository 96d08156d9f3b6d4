"""When a probe has timed enough micro batches: it cannot win any more, or more would say nothing new."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ENOUGH_S = 8.0  # of timed micro batches: then three are enough, or two that agree
BEATEN, BEATEN_AT_ONCE = 1.1, 3.0  # times what is to beat: the quickest of several, the very first
STEADY, ALIKE = 0.005, 0.05  # half of (largest − smallest) ÷ median: of three that need no fourth, of two no third


def is_beaten(times_s: Sequence[float], beat_s: float | None, lengths: int = 1) -> bool:
    """Whether a probe with these timed micro batches is surely slower than `beat_s` seconds each.

    The quickest decides: one that something else disturbed says nothing against a config. `lengths` micro batches of
    different lengths make a round, and only whole rounds are compared.
    """
    means = round_means(times_s, lengths)
    if beat_s is None or not means:
        return False
    return min(means) > beat_s * (BEATEN if len(means) > 1 else BEATEN_AT_ONCE)


def is_enough(times_s: Sequence[float], lengths: int = 1) -> bool:
    """Whether these times say what there is to say: they took long, or agree. Whole rounds, as above."""
    means = round_means(times_s, lengths)
    if not means or len(times_s) % lengths:
        return False
    half_spread = (max(means) - min(means)) / (2 * statistics.median(means))
    if sum(times_s) > ENOUGH_S:
        return len(means) > 2 or lengths > 1 or (len(means) == 2 and half_spread < ALIKE)
    return len(means) > 2 and half_spread < STEADY


def round_means(times_s: Sequence[float], lengths: int) -> list[float]:
    """The mean of each whole round; with one length the times themselves."""
    whole = len(times_s) // lengths * lengths
    return [statistics.fmean(times_s[start : start + lengths]) for start in range(0, whole, lengths)]
