from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.protocols import Strategy
from autotune.search.climb import Observation, Outcome, Proposal, climb, rank
from autotune.search.space import SearchSpace, build_space, needs_at_least
from autotune.values import Attention, Device, FitRequest, LossPath, TrainingConfig, Upcast
from strategies import LADDER
from tests.fakes import SMALL_LADDER, Law, a_cpu, a_gpu, a_request, observe

LAWS = st.builds(
    Law,
    activation_bytes_per_token=st.integers(100_000, 5_000_000),
    logits_bytes_per_token=st.integers(30_000, 2_000_000),
    full_checkpointing_keeps=st.floats(0.03, 0.4),
    full_checkpointing_speed=st.floats(0.6, 0.9),
    chunked_loss_keeps=st.floats(0.05, 0.3),
    upcast_speed=st.floats(0.85, 1.0),
    flash_speed=st.floats(1.0, 1.2),
    half_speed_tokens=st.sampled_from((10, 50, 200, 800, 2000)),
)


@dataclass(frozen=True)
class Scene:
    """A request on a device under a law, with the bytes that it may take."""

    law: Law
    request: FitRequest
    device: Device
    limit_bytes: int

    @property
    def space(self) -> SearchSpace:
        return build_space(self.request, self.device, installed=("flash_attn",))

    def measure(self, config: TrainingConfig) -> Observation:
        return observe(self.law, config, self.limit_bytes)

    def run(
        self,
        ladder: Sequence[Strategy] = SMALL_LADDER,
        measure: Callable[[TrainingConfig], Observation] | None = None,
        **options: Any,
    ) -> tuple[Outcome, list[Proposal]]:
        """The whole climb: its outcome and what it asked."""
        steps = climb(self.space, ladder, self.request, self.device, **options)
        asked: list[Proposal] = []
        try:
            asked.append(next(steps))
            while True:
                asked.append(steps.send((measure or self.measure)(asked[-1].config)))
        except StopIteration as end:
            return end.value, asked

    def grid(self) -> list[TrainingConfig]:
        """Every config of the space, with those that the small ladder reaches, that fits."""
        upcasts = {self.request.start.upcast, Upcast.NONE}
        checkpointing, losses = ("off", "every_2", "full"), (LossPath.FULL, LossPath.CHUNKED)
        configs = [
            self.space.config_at(size, gradient_checkpointing=how, upcast=upcast, loss=loss, attention=attention)
            for size, how, upcast, loss, attention in product(
                self.space.micro_batch_sizes, checkpointing, upcasts, losses, self.space.settings["attention"]
            )
        ]
        return [config for config in configs if self.law.peak_bytes(config) <= self.limit_bytes]


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Limits run from just enough for the smallest config to more than the largest takes."""
    law = draw(LAWS)
    request = a_request(
        gradient_accumulation_steps=draw(st.sampled_from((8, 16, 32))),
        upcast=draw(st.sampled_from((Upcast.FP32, Upcast.NONE))),
        gradient_checkpointing=draw(st.sampled_from(("off", "full"))),
    )
    scene = Scene(law, request, draw(st.sampled_from((a_cpu(), a_gpu()))), 2**60)
    peaks = [law.peak_bytes(config) for config in scene.grid()]
    share = draw(st.floats(0, 1.1))
    return replace(scene, limit_bytes=int(min(peaks) * (max(peaks) / min(peaks)) ** share) + 1)


def a_scene(limit_mib: int = 1500, law: Law | None = None, **changes: Any) -> Scene:
    return Scene(law or Law(), a_request(**changes), a_cpu(), limit_mib * 2**20)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scenes())
def test_best_is_within_five_percent_of_the_best_of_the_grid(scene: Scene) -> None:
    best = scene.run()[0].best
    assert best is not None
    assert best.speed >= 0.95 * max(scene.law.speed(config) for config in scene.grid())


@settings(max_examples=100, deadline=None)
@given(scenes(), st.sampled_from((SMALL_LADDER, LADDER)))
def test_what_is_asked_is_new_legal_and_trains_the_same(scene: Scene, ladder: Sequence[Strategy]) -> None:
    outcome, asked = scene.run(ladder)
    configs = [proposal.config for proposal in asked]
    wanted = scene.request.start
    assert len(set(configs)) == len(configs) <= 24
    assert all(scene.space.legal(config) is None for config in configs)
    assert {config.effective_batch_size for config in configs} == {wanted.effective_batch_size}
    assert {config.sequence_length for config in configs} == {wanted.sequence_length}
    assert outcome.best is not None
    assert outcome.best.fits
    assert outcome.closest is None
    assert {item.config for item in outcome.ranked} <= set(configs)


@settings(max_examples=50, deadline=None)
@given(scenes(), st.integers(1, 12))
def test_probes_stay_within_their_number(scene: Scene, most: int) -> None:
    outcome, asked = scene.run(max_probes=most)
    assert len(asked) <= most
    if outcome.stopped.startswith("stopped after"):
        assert len(asked) == most


@settings(max_examples=50, deadline=None)
@given(scenes(), st.sampled_from((64, 128)))
def test_length_is_kept_where_it_fits_even_with_consent(scene: Scene, shortest: int) -> None:
    outcome, _ = replace(scene, request=replace(scene.request, min_sequence_length=shortest)).run()
    assert outcome.best is not None
    assert outcome.best.config.sequence_length == scene.request.start.sequence_length


TIGHT_MIB = 200  # 180 MiB are fixed; 256 tokens need 48 MiB more at the least, 128 need 24, 64 need 12


def test_length_is_never_shortened_without_consent() -> None:
    outcome, asked = a_scene(TIGHT_MIB).run()
    assert outcome.best is None
    assert {proposal.config.sequence_length for proposal in asked} == {256}


@pytest.mark.parametrize("consent", [{"min_sequence_length": 64}, {"sequence_length_stated": False}])
def test_length_is_shortened_with_consent_once_nothing_else_is_left(consent: dict[str, Any]) -> None:
    outcome, asked = a_scene(TIGHT_MIB, **consent).run()
    wanted = [proposal.config for proposal in asked if proposal.config.sequence_length == 256]
    assert outcome.best is not None
    assert outcome.best.config.sequence_length == 64
    assert wanted[-1].gradient_checkpointing == "full"
    assert "shorter_sequence" in next(item.moves for item in asked if item.config == outcome.best.config)


def test_longest_length_that_fits_is_kept() -> None:
    outcome, _ = a_scene(210, min_sequence_length=32).run()
    assert outcome.best is not None
    assert outcome.best.config.sequence_length == 128


def test_closest_is_the_last_one_down_the_ladder() -> None:
    outcome, asked = a_scene(TIGHT_MIB).run()
    assert outcome.closest is not None
    assert outcome.closest.config == asked[-1].config
    assert outcome.closest.config.gradient_checkpointing == "full"
    assert outcome.closest.config.loss is LossPath.CHUNKED
    assert outcome.stopped.startswith("nothing fits")


def test_without_a_ladder_the_start_is_the_closest() -> None:
    outcome, asked = a_scene(TIGHT_MIB).run(ladder=())
    assert asked[-1].config == a_scene().space.start
    assert outcome.closest is not None
    assert outcome.closest.config == asked[-1].config
    assert outcome.closest is not None


def test_speed_that_stops_rising_ends_the_growth_with_memory_to_spare() -> None:
    law = Law(half_speed_tokens=5)
    outcome, asked = a_scene(100_000, law, gradient_accumulation_steps=64).run()
    assert outcome.best is not None
    assert max(proposal.config.micro_batch_size for proposal in asked) <= 16  # the usual 8, and one look further
    assert "faster" in outcome.stopped


@settings(max_examples=50, deadline=None)
@given(scenes())
def test_out_of_memory_rules_out_all_that_needs_as_much(scene: Scene) -> None:
    failed: list[TrainingConfig] = []
    for proposal in scene.run()[1]:
        assert not any(needs_at_least(proposal.config, config) for config in failed)
        if scene.law.peak_bytes(proposal.config) > scene.limit_bytes:
            failed.append(proposal.config)


def test_checkpointing_is_dropped_where_it_is_not_needed() -> None:
    outcome, asked = a_scene(100_000, gradient_checkpointing="full").run()
    assert outcome.best is not None
    assert outcome.best.config.gradient_checkpointing == "off"
    assert next(item.moves for item in asked if item.config == outcome.best.config) == ("gradient_checkpointing=off",)


def test_several_gpus_share_the_batch() -> None:
    _, asked = a_scene(world_size=4, gradient_accumulation_steps=8).run()
    assert {proposal.config.effective_batch_size for proposal in asked} == {32}
    assert max(proposal.config.micro_batch_size for proposal in asked) <= 8


def test_failure_that_is_not_of_memory_rules_nothing_else_out_and_is_not_repeated() -> None:
    scene = a_scene(upcast=Upcast.FP32)

    def measure(config: TrainingConfig) -> Observation:
        broken = config != scene.space.start
        return Observation(config, False, False, None, None, None) if broken else observe(scene.law, config, 2**60)

    asked = scene.run(measure=measure)[1]
    assert len({item.config for item in asked}) == len(asked) > 4


def test_flash_attention_is_taken_where_it_is_faster() -> None:
    scene = replace(a_scene(), device=a_gpu())
    best = scene.run()[0].best
    assert best is not None
    assert best.config.attention is Attention.FLASH_ATTENTION_2


@pytest.mark.parametrize(
    ("speeds", "spread", "first"),
    [
        ((100, 90), 0.0, 0),
        ((100, 99), 0.0, 1),  # within tolerance: the second takes less memory
        ((100, 97), 0.0, 0),
        ((100, 97), 0.02, 1),  # within the spread of both
        ((100, 90), 0.5, 0),  # a spread is believed up to 5 %
    ],
)
def test_ties_go_to_less_memory(speeds: tuple[int, int], spread: float, first: int) -> None:
    space = a_scene().space
    items = [
        Observation(space.config_at(size), True, False, float(speed), spread, peak)
        for size, speed, peak in zip((2, 1), speeds, (2000, 1000), strict=True)
    ]
    assert rank(space, items, 0.02)[0] == items[first]


def test_ties_are_named() -> None:
    law = Law(full_checkpointing_speed=1.0)
    outcome, _ = a_scene(law=law).run()
    assert outcome.best is not None
    assert outcome.ties
    assert all(item.speed == pytest.approx(outcome.best.speed, rel=0.02) for item in outcome.ties)
