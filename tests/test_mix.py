"""What a dataset's lengths make of a config, against draws from the same lengths."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.mix import (
    best_fit_rows,
    fill,
    packed_line,
    packed_to_try,
    packed_variant,
    samples_per_step,
    slice_means,
    timed_lengths,
    tokens_per_row,
    with_mix,
    worst_length,
)
from autotune.values import (
    Attention,
    Judgement,
    LengthMix,
    TrainingConfig,
    Verdict,
    from_json,
    to_json,
)
from tests.fakes import FakeExecutor, a_request
from tests.tiny import a_probe
from tests.trial_records import report, trial

_chance = random.Random(1)
SKEWED = sorted(round(_chance.lognormvariate(5, 0.9)) + 1 for _ in range(4000))


def a_mix(lengths: list[int], wanted: int = 2048, **changes: Any) -> LengthMix:
    cut = sorted(min(length, wanted) for length in lengths)
    means = slice_means(cut, [(number + 1) / len(cut) for number in range(len(cut))], min(64, len(cut)))
    fields: dict[str, Any] = {
        "quantiles": tuple(round(mean, 2) for mean in means),
        "samples": len(cut),
        "longest": cut[-1],
        "longest_untruncated": max(lengths),
        "truncated": sum(length > wanted for length in lengths),
    }
    return LengthMix(**{**fields, **changes})


def a_config(micro_batch_size: int = 4, effective: int = 16, **changes: Any) -> TrainingConfig:
    fields = {"sequence_length": 2048, "micro_batch_size": micro_batch_size, **changes}
    return TrainingConfig(**{"gradient_accumulation_steps": effective // micro_batch_size, **fields})


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 64))
def test_slices_ascend_and_keep_the_mean(lengths: list[int], count: int) -> None:
    lengths.sort()
    means = slice_means(lengths, [(number + 1) / len(lengths) for number in range(len(lengths))], count)
    assert len(means) == count
    assert list(means) == sorted(means)
    assert sum(means) / count == pytest.approx(sum(lengths) / len(lengths))
    assert lengths[0] - 1e-6 <= means[0]
    assert means[-1] <= lengths[-1] + 1e-6


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8, 32])
def test_timed_lengths_average_to_what_padded_batches_do(micro_batch_size: int) -> None:
    chance = random.Random(2)
    drawn = [min(2048, max(chance.choices(SKEWED, k=micro_batch_size))) for _ in range(20_000)]
    found = timed_lengths(a_config(micro_batch_size, 32), a_mix(SKEWED))
    assert len(found) == 4
    assert list(found) == sorted(found)
    assert sum(found) / 4 == pytest.approx(sum(drawn) / len(drawn), rel=0.03)


def test_samples_of_one_length_are_timed_at_that_one() -> None:
    assert timed_lengths(a_config(), a_mix([100] * 9)) == (100,)
    assert timed_lengths(a_config(), a_mix([1])) == (2,)  # of one token nothing is learned


def test_a_shortened_config_cuts_its_samples() -> None:
    mix = a_mix([100, 1000])
    short = a_config(1, sequence_length=256)
    assert max(timed_lengths(short, mix)) == 256
    assert tokens_per_row(short, mix) == pytest.approx(178)


@pytest.mark.parametrize(
    ("longest", "wanted", "counted", "proven"),
    [
        (730, 2048, "tokens", 736),
        (736, 2048, "tokenizer", 736),
        (5000, 2048, "tokens", 2048),
        (730, 732, "tokens", 732),
        (730, 2048, "estimate", 2048),
    ],
)
def test_memory_is_proven_at_the_longest_sample_where_it_is_known(
    longest: int, wanted: int, counted: str, proven: int
) -> None:
    assert worst_length(a_mix([10, longest], wanted, counted=counted), wanted) == proven


@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_packed_rows_hold_all_samples_and_no_row_could_be_spared_by_filling_holes(lengths: list[int]) -> None:
    rows = best_fit_rows(lengths, 512)
    assert -(-sum(lengths) // 512) <= rows <= len(lengths)
    assert rows <= 2 * -(-sum(lengths) // 512)  # no two rows are half empty


def test_wrapped_rows_are_full_and_whole_samples_leave_holes() -> None:
    mix = a_mix([1300] * 10)
    assert fill(a_config(packing=True), mix) == 1.0
    flash = a_config(packing=True, attention=Attention.FLASH_ATTENTION_2)
    assert fill(flash, mix) == pytest.approx(1300 / 2048)
    assert tokens_per_row(flash, mix) == pytest.approx(1300)
    assert timed_lengths(flash, mix) == ()


def test_packing_keeps_samples_a_step_as_near_as_it_can() -> None:
    mix = a_mix([256] * 20)  # eight to a row
    packed = packed_variant(a_config(1, 64), mix)
    assert (packed.packing, packed.micro_batch_size, packed.gradient_accumulation_steps) == (True, 1, 8)
    assert samples_per_step(packed, mix) == pytest.approx(64)
    crowded = packed_variant(a_config(8, 16), mix)
    assert (crowded.micro_batch_size, crowded.gradient_accumulation_steps) == (2, 1)
    assert samples_per_step(crowded, mix) == pytest.approx(16)


def test_a_packed_config_is_tried_only_beside_an_unpacked_answer_of_a_dataset() -> None:
    mix, config = a_mix(SKEWED), a_config()
    assert packed_to_try(a_request(), config) is None
    assert packed_to_try(a_request(lengths=mix, allow_near=True), config) is None
    assert packed_to_try(a_request(lengths=mix), replace(config, packing=True)) is None
    assert packed_to_try(a_request(lengths=mix), config) == packed_variant(config, mix)


def test_speed_counts_what_is_no_padding_and_averages_lengths() -> None:
    times = (1.0, 2.0, 3.0, 4.0, 1.2, 2.2, 3.2, 4.2)
    found = report(
        micro_batch_times_s=(*times, 99.0), timed_lengths=(1, 2, 3, 4), tokens_per_sample=50.0, optimizer_times_s=(0.4,)
    )
    assert found.step_time_s(2) == pytest.approx(2 * 2.6 + 0.4)  # the round that never ended is left out
    measured = trial(report=found, micro_batch_size=3, gradient_accumulation_steps=2)
    assert measured.tokens_per_second == pytest.approx(50 * 6 / 5.6)
    assert not measured.counts_padding
    assert trial().counts_padding
    cut = replace(found, micro_batch_times_s=times[:3])
    assert cut.step_time_s(2) is None


def test_a_probe_of_a_mix_is_timed_at_its_lengths() -> None:
    mix = a_mix([16, 32, 48, 64], 64)
    request = with_mix(a_probe(), mix)
    assert request.timed_lengths == (16, 32, 48, 64)
    assert request.tokens_per_sample == 40
    assert with_mix(a_probe(), None) == a_probe()
    seen = FakeExecutor().probe(request)
    assert len(seen.micro_batch_times_s) == 8  # two rounds
    assert seen.micro_batch_times_s[0] < seen.micro_batch_times_s[3]


def test_the_line_on_packing_says_speed_and_samples() -> None:
    mix, config = a_mix([256] * 20), a_config(1, 64)
    proof = trial(config=config, report=report(tokens_per_sample=256.0))
    packed = trial(config=packed_variant(config, mix), report=report(tokens_per_sample=2048.0))
    line = packed_line(proof, packed, mix)
    assert "about 64 samples a step instead of 64" in line
    assert "tokens/s" in line
    assert "--allow near" in line
    failed = replace(packed, judgement=Judgement(verdict=Verdict.DEVICE_OOM))
    assert "device_oom, so packing was not timed" in packed_line(proof, failed, mix)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantiles": ()},
        {"quantiles": (0.0, 1.0)},
        {"quantiles": (5.0, 1.0)},
        {"quantiles": (1.0,) * 65},
        {"longest": 3},
        {"samples": 0},
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        a_mix([10, 20], **changes)


def test_a_mix_comes_back_from_json() -> None:
    request = a_request(lengths=a_mix(SKEWED))
    assert from_json(type(request), to_json(request)) == request
