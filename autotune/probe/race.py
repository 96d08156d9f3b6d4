"""When a probe has timed enough micro batches: it cannot win any more, or more would say nothing new."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ENOUGH_S = 4.0  # of timed micro batches: then three are enough, two where one alone takes longer
LONG_S = 12.0  # of one micro batch, which then is enough: what disturbs it is short against it
BEATEN, BEATEN_AT_ONCE = 1.1, 1.5  # times what is to beat: the median of several, the very first
STEADY = 0.005  # half of (largest − smallest) ÷ median: three that agree so well need no fourth


def is_beaten(times_s: Sequence[float], beat_s: float | None, lengths: int = 1) -> bool:
    """Whether a probe with these timed micro batches is surely slower than `beat_s` seconds each.

    `lengths` micro batches of different lengths make a round, and only whole rounds are compared.
    """
    means = round_means(times_s, lengths)
    if beat_s is None or not means:
        return False
    return statistics.median(means) > beat_s * (BEATEN if len(means) > 1 else BEATEN_AT_ONCE)


def is_enough(times_s: Sequence[float], lengths: int = 1) -> bool:
    """Whether these times say what there is to say: they took long, or agree. Whole rounds, as above."""
    means = round_means(times_s, lengths)
    if not means or len(times_s) % lengths:
        return False
    least = 1 if lengths > 1 or times_s[0] > LONG_S else 2 if times_s[0] > ENOUGH_S else 3
    if sum(times_s) > ENOUGH_S and len(means) >= least:
        return True
    return len(means) > 2 and (max(means) - min(means)) / (2 * statistics.median(means)) < STEADY


def round_means(times_s: Sequence[float], lengths: int) -> list[float]:
    """The mean of each whole round; with one length the times themselves."""
    whole = len(times_s) // lengths * lengths
    return [statistics.fmean(times_s[start : start + lengths]) for start in range(0, whole, lengths)]
