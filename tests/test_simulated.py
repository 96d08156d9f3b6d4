"""Simulated landscapes: distorted as documented, the same for the same seed, with predictions that nothing distorts."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.landscape import Landscape, Row, read_landscape
from autotune.predict.context import Context
from autotune.predict.forecast import Target
from autotune.values import GIB, AllocatorSetting, LossPath, TrainingConfig, Verdict
from benchmarks.distortion import (
    ALLOCATED,
    CONFIG,
    CUT,
    FAMILIES,
    KIND_SD,
    NOISE,
    ODD,
    RETRIES,
    SPEED_SD,
    Usual,
    draw_other,
    draw_usual,
)
from benchmarks.simulated import WITH_LIGER, landscape_of, landscapes, main
from benchmarks.surfaces import CARDS, LENGTHS, MODELS, Point, Surface, read_surfaces, target_named

SMALL = "Qwen/Qwen2.5-3B"
CARD = "RTX 3060 12GB"


@pytest.fixture(scope="module")
def everything() -> list[Landscape]:
    return list(landscapes())


@pytest.fixture(scope="module")
def surface() -> Surface:
    return next(one for one in read_surfaces(SMALL) if (one.card, one.sequence_length) == (CARD, 1024))


def drawn_of(surface: Surface, key: str) -> Usual:
    return draw_usual(key, surface.points, context_of(target_named(surface.card)))


def context_of(target: Target) -> Context:
    assert target.context is not None
    return target.context


def fits(landscape: Landscape) -> list[Row]:
    return [row for row in landscape.rows if row.verdict is Verdict.FITS]


def test_every_card_model_and_length_has_a_landscape_of_at_least_60_configs(everything: list[Landscape]) -> None:
    problems = {(one.header.device.name, one.header.model.name, one.header.start.sequence_length) for one in everything}
    assert len(problems) == len(everything) == len(CARDS) * len(MODELS) * len(LENGTHS) >= 8 * 4 * 3
    assert min(len({row.config for row in one.rows}) for one in everything) >= 60
    assert len({one.header.name for one in everything}) == len(everything)


def test_nothing_fits_in_a_few_landscapes_and_everything_in_few(everything: list[Landscape]) -> None:
    shares = [len(fits(one)) / len(one.rows) for one in everything]
    assert 0 < shares.count(0.0) <= len(shares) / 10
    assert shares.count(1.0) <= len(shares) / 10


def test_every_row_trains_with_what_its_header_asks_for(everything: list[Landscape]) -> None:
    for one in everything:
        start = one.header.start
        assert {(row.config.effective_batch_size, row.config.sequence_length) for row in one.rows} == {
            (start.effective_batch_size, start.sequence_length)
        }
        assert {row.config.compute_dtype for row in one.rows} == {start.compute_dtype}
        assert start in {row.config for row in one.rows}


def test_liger_has_rows_on_the_cards_where_it_is_installed_alone(everything: list[Landscape]) -> None:
    has = {one.header.name for one in everything if any(row.config.loss is LossPath.LIGER for row in one.rows)}
    assert has == {one.header.name for one in everything if "liger_kernel" in one.header.installed}
    assert len(has) == len(WITH_LIGER) * len(MODELS) * len(LENGTHS)


def test_cards_without_bfloat16_units_train_in_float16(everything: list[Landscape]) -> None:
    half = {one.header.device.name for one in everything if one.header.start.compute_dtype == "float16"}
    assert half == {"Tesla T4", "Tesla V100-SXM2-16GB"}


def test_what_fits_stays_within_the_card_less_its_headroom(everything: list[Landscape]) -> None:
    for one in everything:
        total = one.header.device.total_bytes or 0
        assert one.header.headroom_bytes == max(total // 50, GIB // 4)
        for row in fits(one):
            assert row.needed_bytes is not None
            assert row.needed_bytes <= total - one.header.headroom_bytes
            assert row.peak_allocated_bytes is not None
            assert row.peak_reserved_bytes is not None
            assert row.peak_allocated_bytes <= row.peak_reserved_bytes < row.needed_bytes


def test_a_row_that_fits_has_eight_micro_batches_and_six_optimizer_steps(everything: list[Landscape]) -> None:
    rows = [row for one in everything for row in fits(one)]
    assert {(len(row.micro_batch_times_s), len(row.optimizer_times_s)) for row in rows} == {(8, 6)}


def test_a_row_out_of_memory_has_no_times_and_asked_for_more_than_was_free(everything: list[Landscape]) -> None:
    rows = [row for one in everything for row in one.rows if row.verdict is Verdict.DEVICE_OOM]
    assert rows
    for row in rows:
        assert not row.micro_batch_times_s
        assert row.true_step_time_s is None
        assert row.tried_bytes is not None
        assert (row.peak_allocated_bytes or 0) + row.tried_bytes > (row.peak_reserved_bytes or 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_landscape_whatever_else_is_asked_for(surface: Surface, family: str) -> None:
    alone = list(landscapes(3, distortion=family, cards=[CARD], models=[SMALL], lengths=[1024]))
    assert alone == [landscape_of(surface, 3, distortion=family)]
    assert alone[0].rows != landscape_of(surface, 4, distortion=family).rows


def test_the_two_families_share_nothing_but_their_predictions(surface: Surface) -> None:
    usual, other = (landscape_of(surface, 0, distortion=family) for family in FAMILIES)
    assert [row.predicted for row in usual.rows] == [row.predicted for row in other.rows]
    assert not {row.true_step_time_s for row in fits(usual)} & {row.true_step_time_s for row in fits(other)}


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_the_surfaces_and_not_distorted(surface: Surface, family: str) -> None:
    points = {point.config: point for point in surface.points}
    for row in landscape_of(surface, 5, distortion=family).rows:
        assert row.predicted is not None
        point = points[row.config]
        assert row.predicted.peak_allocated_bytes == point.peak_allocated_bytes
        assert row.predicted.seconds_by_kind == point.seconds_by_kind
        assert row.predicted.step_time_s == pytest.approx(sum(point.seconds_by_kind.values()))
        assert (row.predicted.memory_factor, row.predicted.time_factor) == (1.0, 1.0)


def test_device_use_is_predicted_with_the_usual_context(surface: Surface) -> None:
    context = context_of(target_named(CARD))
    for row in landscape_of(surface, 0).rows:
        assert row.predicted is not None
        beside = (row.predicted.device_used_bytes or 0) - (row.predicted.peak_reserved_bytes or 0)
        assert (beside == context.likely_bytes) == (not row.config.optimizer.startswith("paged"))


def test_allocated_bytes_are_off_by_one_fraction_and_a_little_for_each_config(everything: list[Landscape]) -> None:
    off = []
    for one in everything:
        ratios = [
            (row.peak_allocated_bytes or 0) / (row.predicted.training_peak_allocated_bytes or 1)
            for row in fits(one)
            if row.predicted
        ]
        if ratios:
            off.append(statistics.median(ratios))
            assert (max(ratios) - min(ratios)) / off[-1] < 2.1 * CONFIG
            assert min(ratios) > (1 - ALLOCATED) * (1 - CONFIG) - 1e-6
            assert max(ratios) < (1 + ALLOCATED) * (1 + CONFIG) + 1e-6
    assert min(off) < 1 - ALLOCATED / 2
    assert max(off) > 1 + ALLOCATED / 2


def test_step_times_are_off_within_what_can_be_drawn(everything: list[Landscape]) -> None:
    widest = math.exp(CUT * (SPEED_SD + KIND_SD))
    ratios = [
        row.true_step_time_s / row.predicted.step_time_s
        for one in everything
        for row in fits(one)
        if row.predicted and row.predicted.step_time_s and row.true_step_time_s
    ]
    assert 1 / widest < min(ratios) < 0.7
    assert 1.4 < max(ratios) < widest * ODD[1] * RETRIES[1]


def test_samples_scatter_about_the_true_time_by_three_per_cent(everything: list[Landscape]) -> None:
    errors = []
    for one in everything:
        for row in fits(one):
            middle = statistics.fmean(row.micro_batch_times_s)
            errors += [time / middle - 1 for time in row.micro_batch_times_s]
    assert statistics.stdev(errors) == pytest.approx(NOISE * math.sqrt(7 / 8), rel=0.1)


def test_the_odd_kernel_slows_the_configs_that_run_it_and_no_other(surface: Surface) -> None:
    drawn = replace(drawn_of(surface, "a"), odd_setting="gradient_checkpointing", odd_values=("full",), odd=1.5)
    plain = replace(drawn, odd=1.0)
    for point in surface.points:
        expected = 1.5 if point.config.gradient_checkpointing == "full" else 1.0
        assert drawn.micro_batch_s(point) / plain.micro_batch_s(point) == pytest.approx(expected)


def test_odd_kernels_are_of_a_setting_or_of_one_or_two_neighbouring_micro_batches(surface: Surface) -> None:
    drawn = [drawn_of(surface, str(seed)) for seed in range(60)]
    assert {one.odd_setting for one in drawn} == {"gradient_checkpointing", "loss", "micro_batch_size"}
    assert all(ODD[0] <= one.odd <= ODD[1] for one in drawn)
    for one in drawn:
        assert len(one.odd_values) == 1 or one.odd_values[1] == 2 * one.odd_values[0]


def test_either_allocator_holds_the_same_tensors(surface: Surface) -> None:
    drawn = drawn_of(surface, "a")
    shares: dict[TrainingConfig, set[float]] = {}
    for point in surface.points:
        key = replace(point.config, allocator=AllocatorSetting.DEFAULT)
        shares.setdefault(key, set()).add(drawn.allocated_share(point))
    assert {len(found) for found in shares.values()} == {1}
    assert len({share for found in shares.values() for share in found}) == len(shares)


def test_a_cache_that_does_not_fit_costs_time_and_no_memory_error(surface: Surface) -> None:
    one = landscape_of(surface, 0)
    drawn = draw_usual(f"{CARD}|{SMALL}|1024|0", surface.points, context_of(target_named(CARD)))
    allowed = (one.header.device.total_bytes or 0) - one.header.headroom_bytes
    points = {point.config: point for point in surface.points}
    late = 0
    for row in fits(one):
        point = points[row.config]
        accumulation = row.config.gradient_accumulation_steps
        unhurt = drawn.micro_batch_s(point) * accumulation + drawn.optimizer_s(point)
        full = row.needed_bytes == allowed
        assert (row.true_step_time_s or 0) > 1.1 * unhurt if full else row.true_step_time_s == pytest.approx(unhurt)
        late += full
    assert late


def test_the_other_family_is_slower_where_a_micro_batch_does_not_fill_the_card(surface: Surface) -> None:
    drawn = replace(draw_other("a", surface.points, context_of(target_named(CARD))), unfilled=0.5)
    alike = [p for p in surface.points if _settings(p) == _settings(surface.points[0])]
    ratios = [drawn.micro_batch_s(p) * p.config.gradient_accumulation_steps / _micro_s(p) for p in alike]
    assert len(ratios) == 5
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1.05 * ratios[-1]


def test_the_other_family_has_late_samples(surface: Surface) -> None:
    drawn = draw_other("a", surface.points, context_of(target_named(CARD)))
    rng = random.Random(0)
    samples = [drawn.sample(1.0, rng) for _ in range(2000)]
    assert statistics.median(samples) == pytest.approx(1.0, abs=0.01)
    assert 0.06 < sum(sample > 1.08 for sample in samples) / len(samples) < 0.14


def test_the_command_writes_files_that_give_the_landscapes_back(tmp_path: Path, surface: Surface) -> None:
    arguments = ["--card", CARD, "--model", SMALL, "--length", "1024", "--seed", "7", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    assert read_landscape(path) == landscape_of(surface, 7)


def _settings(point: Point) -> TrainingConfig:
    return replace(point.config, micro_batch_size=1, gradient_accumulation_steps=1)


def _micro_s(point: Point) -> float:
    return sum(s for kind, s in point.seconds_by_kind.items() if kind != "optimizer")
