"""The ladder: every move keeps what it says it keeps, needs the consent it says it needs, and comes to an end."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.values import (
    AllocatorSetting,
    Attention,
    Device,
    FitRequest,
    LossPath,
    ModelSource,
    Preserves,
    Quantization,
    Trainer,
    TrainingConfig,
    Upcast,
)
from strategies import LADDER, moves_between
from strategies.allocator import ExpandableSegments
from strategies.fewer_modules import attention_modules

CPU = Device(kind="cpu", index=None, name="CPU")
GPU = Device(kind="cuda", index=0, name="NVIDIA GeForce RTX 3090", compute_capability="8.6")
TURING = Device(kind="cuda", index=0, name="Tesla T4", compute_capability="7.5")
ROCM = Device(kind="rocm", index=0, name="AMD Radeon RX 9070", compute_capability="gfx1201")
SPARK = replace(GPU, name="NVIDIA GB10", unified_memory=True)
MODEL = ModelSource(name="a llama", config={"model_type": "llama"})
START = TrainingConfig(sequence_length=2048, micro_batch_size=8, gradient_accumulation_steps=2)
MOVES = {move.name: move for move in LADDER}

#: Fields that a move of each grade may change, the micro batch's two apart.
EXACT_FIELDS = {
    *("allocator", "loss", "attention", "upcast", "gradient_checkpointing", "optimizer"),
    *("micro_batch_size", "gradient_accumulation_steps", "eval_micro_batch_size"),
}
CONSENT_FIELDS = {"sequence_length", "lora_rank", "lora_alpha", "target_modules"}

configs = st.builds(
    TrainingConfig,
    sequence_length=st.integers(1, 9000),
    micro_batch_size=st.integers(1, 40),
    gradient_accumulation_steps=st.integers(1, 9),
    world_size=st.integers(1, 4),
    gradient_checkpointing=st.sampled_from(["off", "full", "offload", "every_2", "every_3", "every_12"]),
    attention=st.sampled_from(Attention),
    optimizer=st.sampled_from(
        (
            *("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit"),
            *("paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "adafactor"),
        )
    ),
    loss=st.sampled_from(LossPath),
    quantization=st.sampled_from(Quantization),
    double_quant=st.booleans(),
    compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    upcast=st.sampled_from(Upcast),
    lora_rank=st.integers(1, 300),
    lora_alpha=st.integers(0, 300),
    target_modules=st.sampled_from(
        [("all-linear",), ("q_proj", "v_proj"), ("q_proj", "up_proj", "o_proj"), ("gate_proj",), ("query_key_value",)]
    ),
    eval_micro_batch_size=st.none() | st.integers(1, 40),
    allocator=st.sampled_from(AllocatorSetting),
    trainer=st.sampled_from(Trainer),
)
devices = st.sampled_from([CPU, GPU, TURING, ROCM, SPARK, replace(GPU, wsl=True), replace(GPU, virtual=True)])


@st.composite
def requests(draw: st.DrawFn) -> FitRequest:
    start = draw(configs)
    return FitRequest(
        model=ModelSource(name="any", config=draw(st.sampled_from([{}, MODEL.config, {"model_type": "gpt_neox"}]))),
        start=start,
        min_sequence_length=draw(st.none() | st.integers(1, start.sequence_length)),
        sequence_length_stated=draw(st.booleans()),
        allow_near=draw(st.booleans()),
        min_lora_rank=draw(st.none() | st.integers(1, start.lora_rank)),
        allow_fewer_modules=draw(st.booleans()),
    )


def request(**consent: Any) -> FitRequest:
    return FitRequest(model=MODEL, start=START, **({"sequence_length_stated": True} | consent))


def changed(before: TrainingConfig, after: TrainingConfig) -> set[str]:
    return {item.name for item in fields(before) if getattr(before, item.name) != getattr(after, item.name)}


def optimizer_mathematics(name: str) -> str:
    """Which update a name computes: paging, fusing and bitsandbytes' own 32-bit kernel do not change it."""
    for ignored in ("paged_", "_torch", "_fused", "_32bit"):
        name = name.replace(ignored, "")
    return name.replace("_bnb_8bit", "_8bit")


@given(request=requests(), device=devices, move=st.sampled_from(LADDER))
def test_a_move_changes_only_what_its_grade_permits(request: FitRequest, device: Device, move: Any) -> None:
    config = request.start
    lower = move.apply(config, request, device)
    if lower is None:
        return
    assert lower != config
    assert move.explains(config, lower)
    assert lower.effective_batch_size == config.effective_batch_size
    assert lower.world_size == config.world_size
    if move.preserves is Preserves.EXACT:
        assert changed(config, lower) <= EXACT_FIELDS
        assert optimizer_mathematics(lower.optimizer) == optimizer_mathematics(config.optimizer)
    elif move.preserves is Preserves.NEAR:
        assert request.allow_near
        assert changed(config, lower) <= {"optimizer", "double_quant"}
    else:
        assert changed(config, lower) <= CONSENT_FIELDS


@given(request=requests(), device=devices)
def test_walking_the_ladder_ends_within_what_was_allowed(request: FitRequest, device: Device) -> None:
    config, seen = request.start, {request.start}
    for move in LADDER:
        while (lower := move.apply(config, request, device)) is not None:
            assert lower not in seen
            seen.add(lower)
            config = lower
            assert len(seen) < 100
    assert config.sequence_length >= (request.min_sequence_length or min(64, request.start.sequence_length))
    assert config.lora_rank >= (request.min_lora_rank or request.start.lora_rank)
    assert config.lora_alpha * request.start.lora_rank == request.start.lora_alpha * config.lora_rank
    # No move opens one further up again, so one walk is enough.
    assert [move.name for move in LADDER if move.apply(config, request, device)] == []


@given(request=requests(), device=devices)
def test_moves_between_names_every_move_of_a_walk_but_checkpointing_passed_through(
    request: FitRequest, device: Device
) -> None:
    config, taken = request.start, []
    for move in LADDER:
        while (lower := move.apply(config, request, device)) is not None:
            config = lower
            taken.append(move.name)
    named = set(moves_between(request.start, config))
    through = {"partial_checkpointing", "full_checkpointing"}
    assert named <= set(taken)
    assert set(taken) - named <= through


STEPS = [
    ("fused_or_chunked_loss", GPU, {"loss": LossPath.FULL}, {"loss": LossPath.CHUNKED}),
    ("fused_or_chunked_loss", GPU, {"loss": LossPath.CHUNKED}, {"loss": LossPath.LIGER}),
    ("fused_or_chunked_loss", ROCM, {"loss": LossPath.CHUNKED}, {"loss": LossPath.LIGER}),
    ("fused_or_chunked_loss", CPU, {"loss": LossPath.CHUNKED}, None),
    ("fused_or_chunked_loss", GPU, {"loss": LossPath.CHUNKED, "trainer": Trainer.TRL}, None),
    ("fused_or_chunked_loss", GPU, {"loss": LossPath.LIGER}, None),
    ("attention_kernel", CPU, {"attention": Attention.EAGER}, {"attention": Attention.SDPA}),
    ("attention_kernel", CPU, {"attention": Attention.SDPA}, None),
    ("attention_kernel", GPU, {"attention": Attention.SDPA}, {"attention": Attention.FLASH_ATTENTION_2}),
    ("attention_kernel", GPU, {"attention": Attention.SDPA, "compute_dtype": "float32"}, None),
    ("attention_kernel", TURING, {"attention": Attention.SDPA, "compute_dtype": "float16"}, None),
    ("attention_kernel", ROCM, {"attention": Attention.SDPA}, None),
    ("attention_kernel", replace(GPU, compute_capability=None), {"attention": Attention.SDPA}, None),
    ("attention_kernel", replace(GPU, compute_capability="12.0"), {}, {"attention": Attention.FLASH_ATTENTION_2}),
    ("no_fp32_copies", CPU, {"upcast": Upcast.FP32}, {"upcast": Upcast.NONE}),
    ("no_fp32_copies", CPU, {"upcast": Upcast.NORMS}, {"upcast": Upcast.NONE}),
    ("no_fp32_copies", CPU, {"upcast": Upcast.FP32, "compute_dtype": "float32"}, None),
    (
        "smaller_micro_batch",
        CPU,
        {"micro_batch_size": 6, "gradient_accumulation_steps": 3, "world_size": 2},
        {"micro_batch_size": 3, "gradient_accumulation_steps": 6},
    ),
    (
        "smaller_micro_batch",
        CPU,
        {"micro_batch_size": 4, "gradient_accumulation_steps": 3, "eval_micro_batch_size": 8},
        {"micro_batch_size": 3, "gradient_accumulation_steps": 4, "eval_micro_batch_size": 3},
    ),
    ("smaller_micro_batch", CPU, {"micro_batch_size": 1, "gradient_accumulation_steps": 16}, None),
    ("smaller_micro_batch", CPU, {"micro_batch_size": 1, "eval_micro_batch_size": 8}, {"eval_micro_batch_size": 1}),
    ("partial_checkpointing", CPU, {"gradient_checkpointing": "off"}, {"gradient_checkpointing": "every_2"}),
    ("partial_checkpointing", CPU, {"gradient_checkpointing": "full"}, None),
    ("full_checkpointing", CPU, {"gradient_checkpointing": "every_3"}, {"gradient_checkpointing": "full"}),
    ("full_checkpointing", CPU, {"gradient_checkpointing": "offload"}, None),
    ("offloaded_checkpointing", GPU, {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "offload"}),
    ("offloaded_checkpointing", CPU, {"gradient_checkpointing": "full"}, None),
    ("offloaded_checkpointing", SPARK, {"gradient_checkpointing": "full"}, None),
    ("offloaded_checkpointing", GPU, {"gradient_checkpointing": "off"}, None),
    ("optimizer_8bit", CPU, {"optimizer": "adamw_torch"}, {"optimizer": "adamw_bnb_8bit"}),
    ("optimizer_8bit", CPU, {"optimizer": "paged_adamw_32bit"}, {"optimizer": "paged_adamw_8bit"}),
    ("optimizer_8bit", CPU, {"optimizer": "adafactor"}, None),
    ("paged_optimizer", GPU, {"optimizer": "adamw_torch_fused"}, {"optimizer": "paged_adamw_32bit"}),
    ("paged_optimizer", GPU, {"optimizer": "adamw_bnb_8bit"}, {"optimizer": "paged_adamw_8bit"}),
    ("paged_optimizer", CPU, {"optimizer": "adamw_torch"}, None),
    ("double_quantization", GPU, {"double_quant": False}, {"double_quant": True}),
    ("double_quantization", GPU, {"double_quant": False, "quantization": Quantization.NONE}, None),
]


@pytest.mark.parametrize(("name", "device", "before", "change"), STEPS)
def test_one_step_of_each_move(
    name: str, device: Device, before: dict[str, Any], change: dict[str, Any] | None
) -> None:
    config = replace(START, **before)
    expected = None if change is None else replace(config, **change)
    assert MOVES[name].apply(config, request(allow_near=True), device) == expected


@pytest.mark.parametrize(
    ("device", "platform", "applies"),
    [
        (GPU, "linux", True),
        (ROCM, "linux", True),
        (GPU, "win32", False),
        (replace(GPU, wsl=True), "linux", False),
        (replace(GPU, virtual=True), "linux", False),
        (CPU, "linux", False),
    ],
)
def test_expandable_segments_where_the_allocator_has_them(device: Device, platform: str, applies: bool) -> None:
    lower = ExpandableSegments(platform=platform).apply(START, request(), device)
    assert (lower is not None) == applies


@pytest.mark.parametrize(
    ("length", "device", "consent", "shorter"),
    [
        (2048, GPU, {"sequence_length_stated": False}, 1024),
        (1000, GPU, {"sequence_length_stated": False}, 512),
        (512, GPU, {"sequence_length_stated": False}, None),
        (256, CPU, {"sequence_length_stated": False}, 128),
        (100, CPU, {"sequence_length_stated": False}, 64),
        (64, CPU, {"sequence_length_stated": False}, None),
        (2048, GPU, {}, None),
        (2048, GPU, {"min_sequence_length": 1500}, 1500),
        (700, GPU, {"min_sequence_length": 128}, 320),
        (100, GPU, {"min_sequence_length": 10}, 48),
        (11, GPU, {"min_sequence_length": 10}, 10),
        (10, GPU, {"min_sequence_length": 10}, None),
        (1024, GPU, {"min_sequence_length": 100, "sequence_length_stated": False}, 512),
    ],
)
def test_sequences_are_halved_only_where_allowed(
    length: int, device: Device, consent: dict[str, Any], shorter: int | None
) -> None:
    lower = MOVES["shorter_sequence"].apply(replace(START, sequence_length=length), request(**consent), device)
    assert (lower and lower.sequence_length) == shorter


@pytest.mark.parametrize(
    ("rank", "alpha", "least", "expected"),
    [
        (16, 16, 4, (8, 8)),
        (16, 32, 10, (10, 20)),
        (9, 18, 2, (4, 8)),
        (9, 6, 2, (3, 2)),  # half would need alpha 8/3
        (16, 1, 4, None),
        (16, 16, 16, None),
        (16, 16, None, None),
    ],
)
def test_a_lower_rank_keeps_the_scale_of_the_adapters(
    rank: int, alpha: int, least: int | None, expected: tuple[int, int] | None
) -> None:
    config = replace(START, lora_rank=rank, lora_alpha=alpha)
    lower = MOVES["lower_rank"].apply(config, request(min_lora_rank=least), GPU)
    assert (lower and (lower.lora_rank, lower.lora_alpha)) == expected


@pytest.mark.parametrize(
    ("modules", "fewer"),
    [
        (("all-linear",), ("q_proj", "k_proj", "v_proj", "o_proj")),
        (("up_proj", "q_proj", "v_proj"), ("q_proj", "v_proj")),
        (("q_proj", "v_proj"), None),
        (("gate_proj", "up_proj"), None),
    ],
)
def test_fewer_modules_are_the_attentions(modules: tuple[str, ...], fewer: tuple[str, ...] | None) -> None:
    config = replace(START, target_modules=modules)
    lower = MOVES["fewer_modules"].apply(config, request(allow_fewer_modules=True), GPU)
    assert (lower and lower.target_modules) == fewer
    assert MOVES["fewer_modules"].apply(config, request(), GPU) is None


@pytest.mark.parametrize("name", ["optimizer_8bit", "double_quantization"])
def test_near_moves_need_allow_near(name: str) -> None:
    config = replace(START, double_quant=False)
    assert MOVES[name].apply(config, request(), GPU) is None
    assert MOVES[name].apply(config, request(allow_near=True), GPU) is not None


def test_the_ladder_is_exact_then_near_then_consent() -> None:
    grades = [move.preserves for move in LADDER if move.name != "paged_optimizer"]  # exact, but after the one it pages
    assert grades == sorted(grades, key=list(Preserves).index)
    assert len(MOVES) == len(LADDER)
    assert all(move.why and "\n" not in move.why for move in LADDER)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ()),
        ({"micro_batch_size": 16, "gradient_accumulation_steps": 1}, ()),
        ({"gradient_checkpointing": "offload"}, ("offloaded_checkpointing",)),
        ({"optimizer": "paged_adamw_8bit"}, ("optimizer_8bit", "paged_optimizer")),
        (
            {"loss": LossPath.LIGER, "micro_batch_size": 1, "gradient_accumulation_steps": 16},
            ("fused_or_chunked_loss", "smaller_micro_batch"),
        ),
    ],
)
def test_moves_between_reads_the_fields(change: dict[str, Any], names: tuple[str, ...]) -> None:
    assert moves_between(START, replace(START, **change)) == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bloom", "falcon", "gpt_neox", "gpt2", "gptj", "opt", "mpt", "phi", "phi3"])
def test_attention_modules_exist_in_transformers(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    source = ModelSource(name=kind, config={"model_type": kind})
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    for wanted in attention_modules(source):
        found = [name for name in layers if name.endswith(f".{wanted}")]
        assert found
        assert not any("mlp" in name or "fc" in name for name in found)
