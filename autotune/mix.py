"""What a dataset's lengths make of a config: padded micro batches, tokens that are no padding, packed rows. Pure."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from autotune.values import FitRequest, LengthMix, ProbeRequest, TrainingConfig, TrialRecord

STRATA = 4  # padded lengths that stand for all micro batches, each for a quarter of them
_PACKED_AT_ONCE = 1024  # samples: trl packs each block of 1,000 that `datasets` maps by itself
_ROUNDED_TO = 8  # tokens


def slice_means(values: Sequence[float], upto: Sequence[float], count: int) -> tuple[float, ...]:
    """The mean of each of `count` slices of equal weight. `values` ascend; value i ends at the share `upto[i]`."""
    means, value, begin = [], 0, 0.0
    for number in range(1, count + 1):
        end, total = number / count, 0.0
        while begin < end - 1e-12:
            stop = min(end, upto[value])
            total += values[value] * (stop - begin)
            begin = stop
            if stop >= upto[value] and value + 1 < len(values):
                value += 1
            elif stop < end:  # the last share is 1 but for rounding
                total, begin = total + values[value] * (end - stop), end
        begin = end
        means.append(total * count)
    return tuple(itertools.accumulate(means, max))  # rounding never makes one smaller than the one before


def worst_length(mix: LengthMix, wanted: int) -> int:
    """The longest batch that a run can meet, to a multiple of 8; all that is wanted where lengths are a guess."""
    return min(wanted, math.ceil(mix.longest / _ROUNDED_TO) * _ROUNDED_TO) if mix.is_exact else wanted


def timed_lengths(config: TrainingConfig, mix: LengthMix) -> tuple[int, ...]:
    """Tokens that micro batches of `config` are padded to: four lengths, each for a quarter of a run's batches.

    A micro batch takes its samples at random and is padded to its longest, so its length is the largest of
    `micro_batch_size` draws: the share of batches up to a length is that of samples to the power of the batch size.
    Of each quarter this is the mean. A packed row is full: ().
    """
    if config.packing:
        return ()
    count = len(mix.quantiles)
    upto = [((number + 1) / count) ** config.micro_batch_size for number in range(count)]
    found = slice_means(_cut(config, mix), upto, STRATA)
    lengths = tuple(max(2, min(config.sequence_length, math.ceil(length - 1e-6))) for length in found)
    return lengths if len(set(lengths)) > 1 else lengths[:1]


def tokens_per_row(config: TrainingConfig, mix: LengthMix) -> float:
    """Tokens of a row that are no padding, on average."""
    if config.packing:
        return config.sequence_length * fill(config, mix)
    cut = _cut(config, mix)
    return sum(cut) / len(cut)


def fill(config: TrainingConfig, mix: LengthMix) -> float:
    """Share of packed rows that is no padding.

    With FlashAttention 2 samples stay whole, as trl's `bfd` packs them: best-fit decreasing over 1,024 samples of this
    mix. Without it all samples are one stream cut into rows (trl's `wrapped`), so rows are full.
    """
    if not config.is_padding_free:
        return 1.0
    lengths = [max(1, round(length)) for length in _cut(config, mix)]
    lengths *= max(1, _PACKED_AT_ONCE // len(lengths))
    rows = best_fit_rows(lengths, config.sequence_length)
    return sum(lengths) / (rows * config.sequence_length)


def best_fit_rows(lengths: Sequence[int], row: int) -> int:
    """How many rows of `row` tokens hold these samples whole: longest first, each where it leaves the least room."""
    rooms: list[int] = []  # ascending
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        left = rooms.pop(place) - length if place < len(rooms) else row - length
        bisect.insort(rooms, left)
    return len(rooms)


def samples_per_row(config: TrainingConfig, mix: LengthMix) -> float:
    """Samples in one row: 1 unless packed."""
    if not config.packing:
        return 1.0
    return tokens_per_row(config, mix) / tokens_per_row(replace(config, packing=False), mix)


def samples_per_step(config: TrainingConfig, mix: LengthMix) -> float:
    """Samples of an optimizer step on average, which is what an effective batch size means to learning."""
    return config.effective_batch_size * samples_per_row(config, mix)


def packed_variant(config: TrainingConfig, mix: LengthMix) -> TrainingConfig:
    """`config` packed, with the accumulation whose samples to an optimizer step are nearest to as many as before.

    The micro batch shrinks only where one alone holds more than that.
    """
    packed = replace(config, packing=True)
    rows = config.effective_batch_size / config.world_size / samples_per_row(packed, mix)
    micro = min(config.micro_batch_size, max(1, round(rows)))
    return replace(packed, micro_batch_size=micro, gradient_accumulation_steps=max(1, round(rows / micro)))


def with_mix(request: ProbeRequest, mix: LengthMix | None) -> ProbeRequest:
    """The probe, timed at the dataset's own lengths; memory is shown at full length in any case."""
    if mix is None:
        return request
    config = request.config
    return replace(request, timed_lengths=timed_lengths(config, mix), tokens_per_sample=tokens_per_row(config, mix))


def packed_to_try(request: FitRequest, proven: TrainingConfig) -> TrainingConfig | None:
    """What a fit measures beside its answer: the same packed. None: no lengths, packed already, or in the search."""
    if request.lengths is None or proven.packing or request.allow_near:
        return None
    return packed_variant(proven, request.lengths)


def packed_line(proof: TrialRecord, packed: TrialRecord, mix: LengthMix) -> str:
    """One line on what packing would bring; what it changes, too."""
    before, after = proof.tokens_per_second, packed.tokens_per_second
    config = packed.config
    batch = f"micro batch {config.micro_batch_size} × {config.gradient_accumulation_steps}"
    samples = f"about {samples_per_step(config, mix):.3g} samples a step instead of {proof.config.effective_batch_size}"
    if not before or not after:
        return f"packed ({batch}): {packed.judgement.verdict}, so packing was not timed"
    return (
        f"packed ({batch}, {samples}): {after:,.0f} tokens/s that are no padding, {after / before:.2f} times as many;"
        " needs --allow near"
    )


def _cut(config: TrainingConfig, mix: LengthMix) -> list[float]:
    return [min(length, float(config.sequence_length)) for length in mix.quantiles]
