from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from autotune.search.belief import (
    CPU_DOUBT,
    GPU_DOUBT,
    NOISE,
    ODD,
    Believed,
    MemoryBelief,
    TimeBelief,
    expected_gains,
    noise_of,
    normal_below,
    oddities,
    shares_of,
)
from autotune.values import GIB, LossPath, TrainingConfig

SECONDS = {"matmul": 3.0, "memory": 1.0}


def a_config(micro_batch_size: int = 4, **changes: object) -> TrainingConfig:
    fields = {"sequence_length": 1024, "micro_batch_size": micro_batch_size, **changes}
    return TrainingConfig(**fields)  # type: ignore[arg-type]


def a_memory(allowed_gib: float = 24) -> MemoryBelief:
    return MemoryBelief(GPU_DOUBT, allowed_gib * GIB)


def test_nothing_measured_leaves_predictions_as_they_are() -> None:
    found = TimeBelief(GPU_DOUBT).of([a_config()], [shares_of(SECONDS)])
    assert found.mean == pytest.approx([0.0])
    assert found.deviations[0] > 0.3


def test_what_is_measured_is_believed_within_its_noise() -> None:
    belief = TimeBelief(GPU_DOUBT)
    belief.observe(a_config(), SECONDS, 6.0, noise=0.01)
    found = belief.of([a_config()], [shares_of(SECONDS)])
    assert found.mean[0] == pytest.approx(math.log(1.5), abs=0.01)
    assert found.deviations[0] < 0.011


def test_one_probe_says_most_of_how_fast_its_neighbours_are() -> None:
    belief = TimeBelief(GPU_DOUBT)
    belief.observe(a_config(), SECONDS, 8.0, noise=0.01)
    near, far = a_config(8), a_config(8, gradient_checkpointing="full", loss=LossPath.CHUNKED)
    found = belief.of([near, far], 2 * [shares_of(SECONDS)])
    assert found.mean == pytest.approx([math.log(2)] * 2, abs=0.1)
    assert found.deviations[0] < found.deviations[1] < 0.2


def test_a_slow_kind_of_operator_is_told_from_a_slow_card() -> None:
    """Products twice as slow as predicted, the rest as predicted: shares tell which is which."""
    belief = TimeBelief(GPU_DOUBT)
    for size, products in ((1, 0.2), (2, 0.5), (4, 0.8), (8, 0.35)):
        seconds = {"matmul": products, "memory": 1 - products}
        belief.observe(a_config(size), seconds, 1 + products, noise=0.005)
    found = belief.of([a_config(16)] * 2, [{"matmul": 0.9, "memory": 0.1}, {"matmul": 0.1, "memory": 0.9}])
    assert found.mean[0] - found.mean[1] > 0.25


def test_an_oddly_slow_setting_is_found_out_by_two_probes() -> None:
    """Full logits take 1.6 times what is predicted, chunked ones what is: after both it is known what is slow."""
    configs = [a_config(size, loss=loss) for size in (4, 8) for loss in (LossPath.FULL, LossPath.CHUNKED)]
    belief = TimeBelief(GPU_DOUBT, oddities(configs))
    assert belief.of(configs, 4 * [shares_of(SECONDS)]).weights[0] == pytest.approx(1 - ODD)
    belief.observe(configs[0], SECONDS, 4.0 * 1.6, noise=0.01)
    belief.observe(configs[1], SECONDS, 4.0, noise=0.01)
    found = belief.of(configs, 4 * [shares_of(SECONDS)])
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.weights[0] < 0.05
    assert math.exp(found.mean[2]) > 1.45
    assert math.exp(found.mean[3]) < 1.15


def test_agreement_with_predictions_lets_oddities_fade() -> None:
    configs = [a_config(size, loss=loss) for size in (4, 8) for loss in (LossPath.FULL, LossPath.CHUNKED)]
    belief = TimeBelief(GPU_DOUBT, oddities(configs))
    for config in configs[:2]:
        belief.observe(config, SECONDS, 4.0, noise=0.01)
    assert belief.of(configs, 4 * [shares_of(SECONDS)]).weights[0] > 0.65 > 1 - ODD


def test_gains_over_hypotheses_are_those_of_each_weighed() -> None:
    believed = Believed(np.array([0.75, 0.25]), np.array([[0.1, -0.3], [-0.2, 0.0]]), np.array([0.05, 0.02]))
    gains = expected_gains(believed, 0.0)
    expected = [
        0.75 * expected_gain(-0.1, 0.05) + 0.25 * expected_gain(0.2, 0.05),
        0.75 * expected_gain(0.3, 0.02) + 0.25 * expected_gain(0.0, 0.02),
    ]
    assert gains == pytest.approx(expected, abs=2e-4)


def test_what_the_allocator_keeps_is_learned_from_what_it_kept() -> None:
    belief = a_memory()
    before = belief.fits(a_config(), 22 * GIB, 21 * GIB, 3 * GIB)
    for _ in range(3):
        belief.observe_cache(0.4)
    assert before < 0.3 < belief.fits(a_config(), 22 * GIB, 21 * GIB, 3 * GIB)


def test_uncertainty_of_a_median_falls_with_samples_and_rises_with_scatter() -> None:
    assert noise_of(()) == NOISE
    assert noise_of([1.0] * 6) < noise_of([1.0] * 2)
    assert noise_of([0.9, 1.1] * 3) > 2 * noise_of([0.99, 1.01] * 3)
    samples = [random.Random(seed).gauss(1.0, 0.03) for seed in range(6)]
    assert 0.005 < noise_of(samples) < 0.03


def test_noise_that_is_claimed_covers_what_happens() -> None:
    rng = random.Random(1)
    rows = [[rng.gauss(1.0, 0.03) for _ in range(6)] for _ in range(300)]
    within = sum(abs(statistics.median(row) - 1.0) <= 2 * noise_of(row) for row in rows)
    assert within / len(rows) > 0.9


def test_memory_that_surely_fits_and_surely_does_not() -> None:
    belief = a_memory()
    assert belief.fits(a_config(), 12 * GIB, 11 * GIB) > 0.999
    assert belief.fits(a_config(), 36 * GIB, 35 * GIB) < 0.001


def test_a_measured_peak_sharpens_every_other_config() -> None:
    belief = a_memory()
    before = belief.needs(a_config(8), 20 * GIB, 19 * GIB)[1]
    belief.observe(a_config(4), 12 * GIB, 11 * GIB, 12.6 * GIB)
    middle, after = belief.needs(a_config(8), 20 * GIB, 19 * GIB)
    assert after < before / 2
    assert 20.6 * GIB < middle < 21.2 * GIB


def test_out_of_memory_is_a_lower_bound_that_lowers_the_chances_of_others() -> None:
    belief = a_memory()
    before = belief.fits(a_config(8), 22.5 * GIB, 21 * GIB)
    belief.observe_at_least(a_config(4), 22 * GIB, 21 * GIB, 24 * GIB)
    assert before > 0.8
    assert belief.fits(a_config(8), 22.5 * GIB, 21 * GIB) < 0.2
    assert belief.needs(a_config(4), 22 * GIB, 21 * GIB)[0] > 23.9 * GIB


def test_out_of_memory_that_was_expected_teaches_next_to_nothing() -> None:
    belief = a_memory()
    belief.observe_at_least(a_config(16), 40 * GIB, 39 * GIB, 24 * GIB)
    assert belief.needs(a_config(), 20 * GIB, 19 * GIB)[0] == pytest.approx(20 * GIB, rel=0.001)


@pytest.mark.parametrize("bound_gib", [9, 12, 20])
def test_the_more_surprising_an_out_of_memory_the_more_it_moves(bound_gib: float) -> None:
    belief = a_memory()
    belief.observe_at_least(a_config(4), 8 * GIB, 7 * GIB, bound_gib * GIB)
    assert bound_gib * GIB * 0.99 < belief.needs(a_config(4), 8 * GIB, 7 * GIB)[0] < bound_gib * GIB * 1.1


def test_nothing_is_believed_to_need_far_less_than_its_tensors() -> None:
    belief = MemoryBelief(CPU_DOUBT, 2 * GIB)
    for tokens in (4, 8):
        belief.observe(a_config(tokens), 1.0 * GIB, 1.0 * GIB, 0.2 * GIB)
    assert belief.needs(a_config(64), 0.3 * GIB, 0.3 * GIB)[0] >= 0.24 * GIB - 1


def test_repeated_bounds_never_make_uncertainty_negative() -> None:
    belief = MemoryBelief(CPU_DOUBT, 0.7 * GIB)
    for size in (8, 4, 2, 1, 1, 1):
        belief.observe_at_least(a_config(size), 0.4 * GIB, 0.4 * GIB, 0.7 * GIB)
    assert np.all(np.linalg.eigvalsh(belief.variance) >= -1e-3)
    assert 0.0 <= belief.fits(a_config(1), 0.4 * GIB, 0.4 * GIB) < 0.3


def expected_gain(lead: float, sd: float) -> float:
    """Of a normal with this mean lead and deviation the expected positive part, in closed form."""
    standard = statistics.NormalDist()
    return lead * standard.cdf(lead / sd) + sd * standard.pdf(lead / sd)


@pytest.mark.parametrize(("lead", "sd"), [(0.05, 1e-6), (-0.05, 1e-6), (0.0, 0.1), (0.02, 0.05), (-0.3, 0.05)])
def test_expected_gain_of_one_hypothesis_is_the_normals(lead: float, sd: float) -> None:
    believed = Believed(np.array([1.0]), np.array([[-lead]]), np.array([sd]))
    assert expected_gains(believed, 0.0)[0] == pytest.approx(expected_gain(lead, sd), abs=2e-4 * max(sd, 0.01))
    assert normal_below(0.0) == 0.5
