from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.search.space import SearchSpace, build_space, needs_at_least, with_setting
from autotune.values import (
    AllocatorSetting,
    Attention,
    Device,
    LengthMix,
    LossPath,
    Quantization,
    Trainer,
    TrainingConfig,
    Upcast,
)
from strategies import LADDER
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
    space = a_space(a_gpu(), ("flash_attn", "liger_kernel"))
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


EVERYTHING = ("flash_attn", "liger_kernel")
MIX = LengthMix(quantiles=(32.0, 64.0, 128.0, 256.0), samples=400, longest=256, longest_untruncated=256, truncated=0)


def values_of(space: SearchSpace, name: str) -> set[Any]:
    return {getattr(config, name) for config in space.configs()}


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        (a_cpu(), {}),
        (a_gpu(), {}),
        (a_gpu(), {"allow_near": True, "gradient_accumulation_steps": 12}),
        (a_gpu(), {"allow_near": True, "lengths": MIX, "upcast": Upcast.FP32, "double_quant": False}),
        (a_gpu(), {"trainer": Trainer.TRL, "loss": LossPath.CHUNKED, "gradient_checkpointing": "every_5"}),
        (a_gpu(), {"fixed": (("micro_batch_size", 4), ("loss", "liger")), "excluded": (("upcast", "fp32"),)}),
    ],
)
def test_every_config_of_the_joint_space_is_legal_and_comes_once(device: Device, changes: dict[str, Any]) -> None:
    space = a_space(device, EVERYTHING, **changes)
    configs = list(space.configs())
    assert len(set(configs)) == len(configs) > 0
    assert [space.legal(config) for config in configs] == [None] * len(configs)
    assert space.start in configs


def test_the_joint_space_of_a_card_is_the_product_of_its_settings() -> None:
    space = a_space(a_gpu(), EVERYTHING, upcast=Upcast.FP32)
    assert values_of(space, "micro_batch_size") == {1, 2, 4, 8}
    assert values_of(space, "gradient_checkpointing") == {"off", "every_2", "every_3", "every_4", "full", "offload"}
    assert values_of(space, "attention") == {Attention.SDPA, FLASH}
    assert values_of(space, "loss") == set(LossPath)
    assert values_of(space, "optimizer") == {"adamw_torch_fused", "paged_adamw_32bit"}
    assert values_of(space, "upcast") == {Upcast.FP32, Upcast.NONE}
    assert values_of(space, "allocator") == set(AllocatorSetting)
    assert len(list(space.configs())) == 4 * 6 * 2 * 3 * 2 * 2 * 2


def test_only_exact_moves_are_in_it_unless_near_ones_are_allowed() -> None:
    changes: dict[str, Any] = {"double_quant": False, "lengths": MIX}
    exact, near = a_space(a_gpu(), EVERYTHING, **changes), a_space(a_gpu(), EVERYTHING, allow_near=True, **changes)
    for name, own in (("double_quant", False), ("packing", False)):
        assert values_of(exact, name) == {own}
        assert values_of(near, name) == {False, True}
    assert {config.effective_batch_size for config in exact.configs()} == {8}
    assert "adamw_bnb_8bit" in values_of(near, "optimizer") - values_of(exact, "optimizer")
    eight_bit = replace(exact.start, optimizer="adamw_bnb_8bit")
    assert "needs --allow near" in (exact.legal(eight_bit) or "")
    assert near.legal(eight_bit) is None


def test_nothing_is_quantized_twice_that_is_not_quantized() -> None:
    space = a_space(a_gpu(), allow_near=True, quantization=Quantization.NONE, double_quant=False)
    assert values_of(space, "double_quant") == {False}


@pytest.mark.parametrize(
    ("samples", "exact", "near"),
    [(8, (1, 2, 4, 8), {3: 9, 7: 7}), (16, (1, 2, 4, 8, 16), {3: 15, 5: 15, 6: 18, 7: 14, 9: 18, 14: 14, 15: 15})],
)
def test_near_sizes_keep_the_real_batch_within_an_eighth(
    samples: int, exact: tuple[int, ...], near: dict[int, int]
) -> None:
    space = a_space(a_gpu(), allow_near=True, gradient_accumulation_steps=samples)
    real = {config.micro_batch_size: config.effective_batch_size for config in space.configs()}
    assert real == dict.fromkeys(exact, samples) | near
    assert space.micro_batch_sizes == exact  # those that `climb` goes over


@given(st.integers(2, 2000))
def test_near_sizes_of_a_large_batch_are_few(samples: int) -> None:
    space = a_space(allow_near=True, gradient_accumulation_steps=samples)
    assert len(space.near_sizes) <= 15 + 8 * max(0, samples.bit_length() - 4)
    assert all(abs(space.resize(space.start, n).effective_batch_size - samples) <= samples / 8 for n in space.sizes)


def test_a_near_batch_with_another_accumulation_than_the_nearest_is_another_batch() -> None:
    space = a_space(allow_near=True)
    assert space.legal(replace(space.start, micro_batch_size=3, gradient_accumulation_steps=3)) is None
    reason = space.legal(replace(space.start, micro_batch_size=5, gradient_accumulation_steps=2))
    assert reason == "effective_batch_size would be 10, not 8"


def test_packed_configs_take_as_many_samples_to_a_step_in_fewer_rows() -> None:
    space = a_space(a_gpu(), EVERYTHING, allow_near=True, lengths=MIX)
    packed = [config for config in space.configs() if config.packing]
    assert {config.effective_batch_size for config in packed if config.attention is Attention.SDPA} < {3, 4, 5}
    fixed = a_space(a_gpu(), EVERYTHING, allow_near=True, lengths=MIX, fixed=(("packing", True),))
    assert fixed.legal(fixed.start) is None
    with_another_batch = replace(packed[0], gradient_accumulation_steps=50)
    assert "another batch" in (space.legal(with_another_batch) or "")


@pytest.mark.parametrize(
    ("device", "changes", "left_out", "reason"),
    [
        (a_gpu(), {}, "loss=liger", "liger_kernel is not installed"),
        (a_gpu(), {}, "attention=flash_attention_2", "flash_attn is not installed"),
        (a_cpu(), {}, "optimizer=paged_adamw_32bit", "no paged memory on Test CPU"),
        (a_gpu(virtual=True), {}, "optimizer=paged_adamw_32bit", "no paged memory on a virtual GPU"),
        (a_gpu(virtual=True), {}, "allocator=expandable_segments", "virtual memory calls"),
        (a_gpu(wsl=True), {}, "allocator=expandable_segments", "WSL2"),
        (a_cpu(), {}, "allocator=expandable_segments", "does not run on cpu"),
        (a_gpu(unified_memory=True), {}, "gradient_checkpointing=offload", "in the host's memory already"),
        (a_cpu(), {"model": a_model(num_hidden_layers=3)}, "gradient_checkpointing=every_3", "the model has 3"),
        (a_cpu(), {"model": a_model(text_config={"n_layer": 2})}, "gradient_checkpointing=every_2", "the model has 2"),
        (a_cpu(), {"trainer": Trainer.TRL, "loss": LossPath.CHUNKED}, "loss=full", "trl from 1.15"),
    ],
)
def test_what_cannot_run_is_never_proposed_and_the_reason_is_kept(
    device: Device, changes: dict[str, Any], left_out: str, reason: str
) -> None:
    space = a_space(device, **changes)
    name, _, value = left_out.partition("=")
    assert reason in dict(space.excluded)[left_out]
    assert value not in values_of(space, name)
    kind = type(getattr(space.start, name))
    change: dict[str, Any] = {name: kind(value)}
    assert reason in (space.legal(replace(space.start, **change)) or "")


def test_liger_is_left_to_cards_and_to_trainers_that_use_it() -> None:
    assert LossPath.LIGER not in values_of(a_space(a_cpu(), EVERYTHING), "loss")
    trl = a_space(a_gpu(), EVERYTHING, trainer=Trainer.TRL, loss=LossPath.CHUNKED)
    assert values_of(trl, "loss") == {LossPath.CHUNKED}


def test_a_request_keeps_a_setting_that_is_proposed_to_nobody() -> None:
    own: dict[str, Any] = {"attention": Attention.EAGER, "optimizer": "sgd", "gradient_checkpointing": "every_7"}
    space = a_space(a_cpu(), upcast=Upcast.NORMS, model=a_model(num_hidden_layers=4), **own)
    assert {name: getattr(space.start, name) for name in own} == own
    assert values_of(space, "attention") == {Attention.EAGER, Attention.SDPA}
    assert values_of(space, "upcast") == {Upcast.NORMS, Upcast.NONE}
    assert Attention.EAGER not in values_of(a_space(), "attention")


@pytest.mark.parametrize("name", ["compute_dtype", "lora_dropout", "trainer"])
def test_what_no_search_changes_is_not_legal_otherwise(name: str) -> None:
    other: dict[str, Any] = {"compute_dtype": "float16", "lora_dropout": 0.5, "trainer": Trainer.LOOP}
    space = a_space()
    assert space.legal(with_setting(space.start, name, other[name])) == f"{name} may not change"


def test_fallbacks_give_up_length_then_rank_then_modules_one_upon_the_other() -> None:
    space = a_space(min_sequence_length=64, min_lora_rank=8, allow_fewer_modules=True)
    found = space.fallbacks(LADDER)
    starts = [(one.start.sequence_length, one.start.lora_rank, len(one.start.target_modules)) for one in found]
    assert starts == [(128, 16, 1), (64, 16, 1), (64, 8, 1), (64, 8, 4)]
    given_up = [space.given_up(one.start) for one in found]
    assert sorted(given_up) == given_up
    for one in found:
        assert {config.sequence_length for config in one.configs()} == {one.start.sequence_length}
        assert all(space.legal(config) is None for config in one.configs())


def test_without_consent_there_is_no_fallback() -> None:
    assert a_space(allow_near=True).fallbacks(LADDER) == []
