from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.search.space import SearchSpace, build_space, needs_at_least
from autotune.values import AllocatorSetting, Attention, Device, LossPath, TrainingConfig, Upcast
from tests.fakes import Law, a_cpu, a_gpu, a_model, a_request

FLASH = Attention.FLASH_ATTENTION_2


def a_space(device: Device | None = None, installed: tuple[str, ...] = (), **changes: Any) -> SearchSpace:
    return build_space(a_request(**changes), device or a_cpu(), installed=installed)


@pytest.mark.parametrize(
    ("accumulation", "world_size", "sizes"),
    [(8, 1, (1, 2, 4, 8)), (12, 1, (1, 2, 3, 4, 6, 12)), (7, 1, (1, 7)), (1, 1, (1,)), (4, 2, (1, 2, 4))],
)
def test_micro_batch_sizes_divide_the_batch_of_one_gpu(
    accumulation: int, world_size: int, sizes: tuple[int, ...]
) -> None:
    space = a_space(gradient_accumulation_steps=accumulation, world_size=world_size)
    assert space.micro_batch_sizes == sizes


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 4))
def test_every_size_keeps_the_effective_batch(micro: int, accumulation: int, world_size: int) -> None:
    space = a_space(micro_batch_size=micro, gradient_accumulation_steps=accumulation, world_size=world_size)
    for size in space.micro_batch_sizes:
        config = space.config_at(size)
        assert config.effective_batch_size == micro * accumulation * world_size
        assert space.legal(config) is None


def test_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="not 3"):
        a_space(gradient_accumulation_steps=8).config_at(3)


def test_start_is_the_request_at_the_smallest_micro_batch() -> None:
    space = a_space(micro_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing="full", lora_rank=8)
    assert space.start == replace(space.request.start, micro_batch_size=1, gradient_accumulation_steps=8)


@pytest.mark.parametrize(
    ("name", "own", "values"),
    [
        ("gradient_checkpointing", "off", ("off", "full")),
        ("gradient_checkpointing", "full", ("full", "off")),
        ("gradient_checkpointing", "every_2", ("every_2", "off", "full")),
        ("upcast", Upcast.FP32, (Upcast.FP32, Upcast.NONE)),
        ("upcast", Upcast.NORMS, (Upcast.NORMS,)),
        ("upcast", Upcast.NONE, (Upcast.NONE,)),
        ("loss", LossPath.CHUNKED, (LossPath.CHUNKED,)),
        ("attention", Attention.SDPA, (Attention.SDPA,)),
        ("attention", Attention.EAGER, (Attention.EAGER, Attention.SDPA)),
    ],
)
def test_alternatives_begin_with_the_requests_own(name: str, own: Any, values: tuple[str, ...]) -> None:
    changes: dict[str, Any] = {name: own}
    assert a_space(**changes).settings[name] == values


@pytest.mark.parametrize(
    ("device", "installed", "changes", "reason"),
    [
        (a_gpu(), (), {}, "flash_attn is not installed"),
        (a_gpu(name="Tesla T4", compute_capability="7.5"), ("flash_attn",), {}, "8.0, not 7.5"),
        (a_gpu(compute_capability=None), ("flash_attn",), {}, "not unknown"),
        (a_gpu(), ("flash_attn",), {"compute_dtype": "float32"}, "16-bit"),
        (a_gpu(), ("flash_attn",), {"model": a_model(head_dim=512)}, "heads of 256"),
        (a_cpu(), ("flash_attn",), {"attention": FLASH}, "does not run on cpu"),
    ],
)
def test_flash_attention_is_left_out_with_the_reason(
    device: Device, installed: tuple[str, ...], changes: dict[str, Any], reason: str
) -> None:
    space = a_space(device, installed, **changes)
    assert FLASH not in space.settings["attention"]
    assert space.start.attention is Attention.SDPA
    assert reason in dict(space.excluded)["attention=flash_attention_2"]
    assert reason in (space.legal(replace(space.start, attention=FLASH)) or "")


def test_flash_attention_is_an_alternative_where_it_runs() -> None:
    space = a_space(a_gpu(), ("flash_attn",))
    assert space.settings["attention"] == (Attention.SDPA, FLASH)
    assert space.excluded == ()


@pytest.mark.parametrize(
    ("request_changes", "config_changes", "reason"),
    [
        ({}, {"micro_batch_size": 2}, "effective_batch_size would be 16, not 8"),
        ({"allow_near": True}, {"gradient_accumulation_steps": 7}, "effective_batch_size would be 7"),
        ({}, {"sequence_length": 128}, "below 256"),
        ({"min_sequence_length": 128}, {"sequence_length": 64}, "below 128"),
        ({"min_sequence_length": 128}, {"sequence_length": 128}, None),
        ({"sequence_length_stated": False}, {"sequence_length": 64}, None),
        ({}, {"sequence_length": 512}, "above the 256"),
        ({}, {"lora_rank": 8}, "lora_rank 8"),
        ({"min_lora_rank": 8}, {"lora_rank": 8}, None),
        ({"min_lora_rank": 8}, {"lora_rank": 4}, "lora_rank 4"),
        ({}, {"target_modules": ("q_proj",)}, "target_modules"),
        ({"allow_fewer_modules": True}, {"target_modules": ("q_proj",)}, None),
        ({}, {"loss": LossPath.LIGER}, "liger_kernel is not installed"),
        ({}, {"loss": LossPath.CHUNKED}, None),
        ({}, {"gradient_checkpointing": "offload"}, "host's memory already"),
        ({}, {"allocator": AllocatorSetting.EXPANDABLE_SEGMENTS}, "does not run on cpu"),
    ],
)
def test_what_is_not_legal_says_why(
    request_changes: dict[str, Any], config_changes: dict[str, Any], reason: str | None
) -> None:
    space = a_space(**request_changes)
    found = space.legal(replace(space.start, **config_changes))
    assert found is None if reason is None else reason in (found or "legal")


def test_longer_sequence_gives_up_less_whatever_the_rank() -> None:
    space = a_space(min_sequence_length=64, min_lora_rank=1)
    shorter = space.given_up(replace(space.start, sequence_length=128))
    lower = space.given_up(replace(space.start, lora_rank=1))
    assert space.given_up(space.start) == (0, 0, 0) < lower < shorter


def configs() -> st.SearchStrategy[TrainingConfig]:
    return st.builds(
        TrainingConfig,
        sequence_length=st.sampled_from((64, 128)),
        micro_batch_size=st.integers(1, 4),
        gradient_checkpointing=st.sampled_from(("off", "every_3", "every_2", "full", "offload")),
        attention=st.sampled_from(Attention),
        loss=st.sampled_from((LossPath.FULL, LossPath.CHUNKED)),
        upcast=st.sampled_from(Upcast),
        double_quant=st.booleans(),
    )


@settings(max_examples=100, deadline=None)
@given(configs(), configs())
def test_memory_order_agrees_with_a_monotone_law(one: TrainingConfig, other: TrainingConfig) -> None:
    law = Law()
    if needs_at_least(one, other):
        assert law.peak_bytes(one) >= law.peak_bytes(other)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 8}),
        ({"gradient_checkpointing": "off"}, {"gradient_checkpointing": "every_3"}),
        ({"gradient_checkpointing": "every_3"}, {"gradient_checkpointing": "every_2"}),
        ({"gradient_checkpointing": "full"}, {"gradient_checkpointing": "offload"}),
        ({"attention": Attention.EAGER}, {"attention": FLASH}),
        ({"loss": LossPath.FULL}, {"loss": LossPath.CHUNKED}),
        ({"upcast": Upcast.FP32, "lora_rank": 32}, {"upcast": Upcast.NONE}),
    ],
)
def test_memory_order_goes_one_way(more: dict[str, Any], less: dict[str, Any]) -> None:
    larger = TrainingConfig(**{"sequence_length": 64, "micro_batch_size": 1, **more})
    smaller = TrainingConfig(**{"sequence_length": 64, "micro_batch_size": 1, **less})
    assert needs_at_least(larger, smaller)
    assert not needs_at_least(smaller, larger)


def test_memory_order_does_not_guess_between_optimizers() -> None:
    one = TrainingConfig(sequence_length=64, micro_batch_size=2, optimizer="adamw_bnb_8bit")
    other = TrainingConfig(sequence_length=64, micro_batch_size=1, optimizer="adamw_torch_fused")
    assert not needs_at_least(one, other)
