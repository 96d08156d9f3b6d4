"""The search without probes, over a made-up law of memory and time."""

from __future__ import annotations

from dataclasses import replace

from autotune.predict.forecast import Forecast
from autotune.predict.memory import MemoryForecast
from autotune.search.quickest import families, fastest
from autotune.values import AllocatorSetting, LossPath, TrainingConfig
from tests.tiny import a_config

START = a_config(micro_batch_size=16, gradient_accumulation_steps=1, loss=LossPath.FULL)


def seconds(config: TrainingConfig) -> float:
    """Larger micro batches are quicker, checkpointing costs a third, chunks a tenth."""
    slower = (4 / 3 if config.gradient_checkpointing == "full" else 1) * (1.1 if config.loss is LossPath.CHUNKED else 1)
    return (10 + 4 / config.micro_batch_size) * slower


def needs(config: TrainingConfig) -> int:
    """Units of memory: the allocator's default wastes a tenth."""
    each = (10 if config.gradient_checkpointing == "off" else 3) + (6 if config.loss is LossPath.FULL else 1)
    wasted = 1.1 if config.allocator is AllocatorSetting.DEFAULT else 1.0
    return round((20 + each * config.micro_batch_size) * wasted)


def a_card(capacity: int) -> tuple[list[TrainingConfig], Forecast]:
    """(configs whose memory was predicted, the fastest)."""
    asked: list[TrainingConfig] = []

    def predict(config: TrainingConfig) -> Forecast:
        asked.append(config)
        used = needs(config)
        memory = MemoryForecast(
            after_load_bytes=20,
            forward_peak_allocated_bytes=used,
            peak_allocated_bytes=used,
            peak_reserved_bytes=used,
            training_peak_allocated_bytes=used,
            evaluation_peak_allocated_bytes=20,
        )
        return Forecast(
            config=config,
            memory=memory,
            device_used_bytes=used,
            step_time_s=seconds(config),
            intervals={},
            capacity_bytes=capacity,
            fits=used <= capacity,
        )

    best, seen = fastest(families(START), predict, seconds)
    assert [found.config for found in seen if found.config not in asked] == []
    return asked, best


def test_every_config_keeps_the_effective_batch() -> None:
    configs = [config for family in families(START) for config in family]
    assert {config.effective_batch_size for config in configs} == {16}
    assert {config.micro_batch_size for config in configs} == {1, 2, 4, 8, 16}
    assert len(configs) == 4 * 5


def test_it_is_the_fastest_of_all_that_fit() -> None:
    configs = [
        config for family in families(START) for one in family for config in (one, _expandable(one))
    ]  # each with either allocator
    for capacity in range(24, 320, 7):
        fitting = [config for config in configs if needs(config) <= capacity]
        _, best = a_card(capacity)
        if fitting:
            assert best.fits
            assert seconds(best.config) <= min(map(seconds, fitting)) * 1.01, capacity
        else:
            assert not best.fits
            assert best.device_used_bytes == min(map(needs, configs))


def test_what_cannot_be_faster_costs_no_prediction_of_memory() -> None:
    asked, best = a_card(1000)
    assert (best.config.gradient_checkpointing, best.config.loss) == ("off", LossPath.FULL)
    assert len(asked) == 5  # that family alone


def test_expandable_segments_come_in_where_the_default_does_not_fit() -> None:
    _, best = a_card(36)  # 20 + 16 units of one sample at once
    assert best.config.allocator is AllocatorSetting.EXPANDABLE_SEGMENTS


def _expandable(config: TrainingConfig) -> TrainingConfig:
    return replace(config, allocator=AllocatorSetting.EXPANDABLE_SEGMENTS)
