"""The search with predictions, on made-up laws: its proposals are pure functions of what it was told."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autotune.search.climb import Observation, Outcome, Proposal
from autotune.search.seek import seek, without_resorts
from autotune.search.space import SearchSpace, build_space
from autotune.values import (
    AllocatorSetting,
    Device,
    FitRequest,
    LossPath,
    TrainingConfig,
    Upcast,
)
from strategies import LADDER
from tests.fakes import FakePredictor, Law, a_gpu, a_request, observe

MIB = 2**20
Truth = Callable[[TrainingConfig], Observation]


@dataclass
class Run:
    """A search driven to its end."""

    outcome: Outcome | None
    proposals: list[Proposal] = field(default_factory=list)
    observed: list[Observation] = field(default_factory=list)

    @property
    def configs(self) -> list[TrainingConfig]:
        return [proposal.config for proposal in self.proposals]

    @property
    def out_of_memory(self) -> int:
        return sum(observation.out_of_memory for observation in self.observed)

    @property
    def best(self) -> TrainingConfig:
        assert self.outcome is not None
        assert self.outcome.best is not None
        return self.outcome.best.config


@dataclass
class Tracing(FakePredictor):
    """One that has to trace each class of configs before it can say anything of it."""

    traced: set[TrainingConfig] = field(default_factory=set)

    def at_hand(self, config: TrainingConfig) -> bool:
        return _trace(config) in self.traced

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        self.traced.add(_trace(config))
        return super().seconds(config)


def request(**changes: Any) -> FitRequest:
    return a_request(**{"gradient_accumulation_steps": 16, "upcast": Upcast.FP32, **changes})


def drive(
    truth: Truth,
    predictor: FakePredictor,
    asked: FitRequest | None = None,
    device: Device | None = None,
    **options: Any,
) -> Run:
    device = device or a_gpu()
    space = build_space(asked or request(), device)
    steps = seek([space, *space.fallbacks(LADDER)], predictor, device, **options)
    run = Run(None)
    try:
        proposal = next(steps)
        while True:
            run.proposals.append(proposal)
            run.observed.append(truth(proposal.config))
            proposal = steps.send(run.observed[-1])
    except StopIteration as end:
        run.outcome = end.value
    return run


def lawful(law: Law, limit_mib: int) -> Truth:
    return lambda config: observe(law, config, limit_mib * MIB)


def a_predictor(limit_mib: int, law: Law | None = None, **changes: Any) -> FakePredictor:
    return FakePredictor(law=law or Law(), allowed_bytes=limit_mib * MIB, **changes)


def best_speed(law: Law, limit_mib: int, space: SearchSpace) -> float:
    return max(law.speed(config) for config in space.configs() if law.peak_bytes(config) <= limit_mib * MIB)


@pytest.mark.parametrize("limit_mib", [300, 500, 700, 1100, 2500])
def test_true_predictions_give_the_best_config_in_few_probes_without_out_of_memory(limit_mib: int) -> None:
    law = Law()
    run = drive(lawful(law, limit_mib), a_predictor(limit_mib))
    space = build_space(request(), a_gpu())
    assert law.speed(run.best) > 0.99 * best_speed(law, limit_mib, space)
    assert run.out_of_memory == 0
    assert len(run.proposals) <= 8


@pytest.mark.parametrize("error", [0.93, 1.07])
def test_memory_that_is_off_is_learned_from_the_first_probe(error: float) -> None:
    law = Law()
    run = drive(lawful(law, 700), a_predictor(700, memory_error=error))
    assert law.speed(run.best) > 0.97 * best_speed(law, 700, build_space(request(), a_gpu()))
    assert run.out_of_memory <= 1


def test_a_setting_that_is_slow_against_all_predictions_is_left() -> None:
    """Full logits are predicted quickest and are half as fast: another loss is tried, and kept."""

    def truth(config: TrainingConfig) -> Observation:
        seen = observe(Law(), config, 20_000 * MIB)
        if config.loss is not LossPath.FULL or not seen.fits:
            return seen
        slow = tuple(2 * time for time in seen.times_s)
        return replace(seen, tokens_per_second=seen.speed / 2, times_s=slow, step_time_s=2 * (seen.step_time_s or 0.0))

    run = drive(truth, a_predictor(20_000))
    assert run.configs[0].loss is LossPath.FULL
    assert run.best.loss is LossPath.CHUNKED


def test_no_config_comes_twice_and_no_more_than_allowed() -> None:
    rng = random.Random(3)

    def truth(config: TrainingConfig) -> Observation:
        seen = observe(Law(), config, 700 * MIB)
        factor = rng.uniform(0.5, 1.5)
        return replace(seen, tokens_per_second=seen.speed * factor, step_time_s=(seen.step_time_s or 1.0) / factor)

    run = drive(truth, a_predictor(700), max_probes=7)
    assert len(set(run.configs)) == len(run.configs) <= 7


def test_the_same_observations_give_the_same_proposals() -> None:
    first, second = (drive(lawful(Law(), 700), a_predictor(700, time_error=0.8)) for _ in range(2))
    assert first.proposals == second.proposals
    assert first.outcome == second.outcome


def test_what_is_known_already_is_not_proposed_and_saves_probes() -> None:
    whole = drive(lawful(Law(), 700), a_predictor(700))
    again = drive(lawful(Law(), 700), a_predictor(700), known=whole.observed)
    assert again.proposals == []
    assert again.best == whole.best


def test_a_stopped_search_goes_on_from_what_it_knows() -> None:
    whole = drive(lawful(Law(), 700), a_predictor(700, time_error=0.8))
    assert len(whole.proposals) > 1
    rest = drive(lawful(Law(), 700), a_predictor(700, time_error=0.8), known=whole.observed[:1])
    assert rest.configs == whole.configs[1:]


def test_nothing_that_can_be_predicted_leaves_the_search_to_another() -> None:
    run = drive(lawful(Law(), 700), a_predictor(700, is_traceable=lambda config: False))
    assert run.outcome is None
    assert run.proposals == []


def test_a_setting_that_cannot_be_traced_is_never_proposed() -> None:
    run = drive(lawful(Law(), 3000), a_predictor(3000, is_traceable=lambda config: config.loss is not LossPath.FULL))
    assert run.proposals
    assert {config.loss for config in run.configs} == {LossPath.CHUNKED}


def test_a_setting_that_the_model_does_not_have_is_given_up_whole() -> None:
    def truth(config: TrainingConfig) -> Observation:
        seen = observe(Law(), config, 20_000 * MIB)
        if config.loss is not LossPath.FULL:
            return seen
        return replace(seen, fits=False, tokens_per_second=None, step_time_s=None, times_s=(), peak_bytes=None)

    ran = build_space(request(), a_gpu()).config_at(1, loss=LossPath.CHUNKED, upcast=Upcast.NONE)
    run = drive(truth, a_predictor(20_000), known=[truth(ran)])
    assert 1 <= sum(config.loss is LossPath.FULL for config in run.configs) <= 3
    assert run.best.loss is LossPath.CHUNKED


def test_traces_are_made_only_where_they_could_win() -> None:
    """What recomputes and fits in any case is slower than what recomputes nothing: it is not traced."""
    predictor = Tracing(allowed_bytes=20_000 * MIB)
    run = drive(lawful(Law(), 20_000), predictor)
    assert run.best.gradient_checkpointing == "off"
    space = build_space(request(), a_gpu())
    assert len(predictor.traced) < len({_trace(config) for config in space.configs()}) / 3


def _trace(config: TrainingConfig) -> TrainingConfig:
    size = 1 if config.micro_batch_size == 1 else 2
    return replace(config, micro_batch_size=size, gradient_accumulation_steps=1, allocator=AllocatorSetting.DEFAULT)


def test_shorter_sequences_come_only_with_consent_and_where_nothing_else_fits() -> None:
    least = min(Law().peak_bytes(config) for config in build_space(request(), a_gpu()).configs()) // MIB
    kept = drive(lawful(Law(), least - 3), a_predictor(least - 3))
    assert kept.outcome is not None
    assert kept.outcome.best is None
    assert {config.sequence_length for config in kept.configs} == {256}
    asked = request(min_sequence_length=64)
    cut = drive(lawful(Law(), least - 3), a_predictor(least - 3), asked)
    assert cut.best.sequence_length == 128
    wide = drive(lawful(Law(), least + 60), a_predictor(least + 60), asked)
    assert wide.best.sequence_length == 256


def test_where_nothing_is_predicted_to_fit_one_is_seen() -> None:
    run = drive(lawful(Law(), 50), a_predictor(50))
    assert run.outcome is not None
    assert len(run.proposals) == 1
    assert run.out_of_memory == 1
    assert run.outcome.best is None
    assert run.outcome.closest is not None


def test_predictions_that_are_far_too_high_are_overruled_by_what_is_seen() -> None:
    law = Law()
    run = drive(lawful(law, 1500), a_predictor(1500, memory_error=20.0))
    assert run.outcome is not None
    assert run.outcome.best is not None
    assert run.out_of_memory == 0


def test_of_configs_that_run_the_same_kernels_the_plain_one_is_probed() -> None:
    run = drive(lawful(Law(), 3000), a_predictor(3000))
    assert {config.allocator for config in run.configs} == {AllocatorSetting.DEFAULT}
    assert {config.optimizer for config in run.configs} == {"adamw_torch_fused"}
    paged = TrainingConfig(sequence_length=8, micro_batch_size=1, optimizer="paged_adamw_32bit")
    assert without_resorts(paged) == without_resorts(replace(paged, optimizer="adamw_torch_fused"))


def test_ties_go_to_less_memory_and_are_told() -> None:
    """A law without any gain from size: all micro batches are as fast, the smallest is kept."""
    law = Law(half_speed_tokens=0)
    run = drive(lawful(law, 3000), a_predictor(3000, law), tolerance=0.01)
    assert run.outcome is not None
    peak = law.peak_bytes(run.best)
    assert all(peak <= law.peak_bytes(tie.config) for tie in run.outcome.ties)


def test_a_wide_tolerance_stops_sooner() -> None:
    predictor = a_predictor(700, time_error=0.8)
    patient = drive(lawful(Law(), 700), predictor, tolerance=0.001)
    hasty = drive(lawful(Law(), 700), predictor, tolerance=0.2)
    assert len(hasty.proposals) <= len(patient.proposals)
    assert hasty.outcome is not None
    assert "no other config is expected to gain" in hasty.outcome.stopped
