"""Dry runs against tracked real steps, and traces against themselves: repeated layers, other points, other programs."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from autotune.hardware.cards import find_card
from autotune.predict import tracing
from autotune.predict.distill import SizeTable, fit, raw_blocks
from autotune.predict.dryrun import DryRun
from autotune.predict.kernels import CPU, KernelSet
from autotune.predict.memory import ROUNDING, forecast_memory, rounded
from autotune.predict.steptime import forecast_time
from autotune.predict.trace import MONOMIALS, Expansion, NotAlike, Trace, from_document, monomials, to_document
from autotune.values import LossPath, ModelSource, Quantization, Trainer, TrainingConfig, Upcast
from autotune.workload.build import build_base
from autotune.workload.step import TrainingStep
from autotune.workload.tracking import LiveBytes, model_tensors
from tests.tiny import a_config

BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
GEMMA2 = {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "gemma": {"head_dim": 32},
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": {"n_inner": 384},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **GEMMA2},
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "stablelm": {},
}
CUDA = KernelSet()


def a_model(kind: str, **changes: Any) -> ModelSource:
    return ModelSource(name=kind, config={**BASE, "model_type": kind, **CHANGES[kind], **changes})


def a_dry_config(kind: str = "llama", **changes: Any) -> TrainingConfig:
    fields = {"gradient_accumulation_steps": 1, "optimizer": "adamw_torch", "micro_batch_size": 2, **changes}
    return a_config(
        **{"attention": "eager" if kind in ("gemma2", "gpt_oss") else "sdpa", "sequence_length": 128, **fields}
    )


def real_peak(source: ModelSource, config: TrainingConfig, folder: str) -> int:
    """Live bytes of one primed micro batch on the CPU. Adam's step counts stay on the host on any device: left out."""
    gc.collect()
    step = TrainingStep(build_base(source, config, torch.device("cpu")), config, folder=folder)
    step.prime_optimizer()
    (batch,) = step.batches(1)
    items = step.items_in([batch])
    tracker = LiveBytes("cpu")
    tracker.see(model_tensors(step.model))
    tracker.see(tensor for tensor in step.optimizer_tensors() if tensor.ndim)
    tracker.see(batch.values())
    with tracker:
        step.micro_batch(batch, items)
    return tracker.peak_bytes


def dry_trace(source: ModelSource, config: TrainingConfig) -> Trace:
    """Of the CPU's operators at the config's own point; what kernels hide from a tracker is left out."""
    run = DryRun(source, config, CPU, hidden_temporaries=False)
    try:
        point = (config.micro_batch_size, config.sequence_length)
        traced = run.trace(*point, accumulates=False, evaluates=False)
        return tracing._distilled(run, config, [point], [traced])
    finally:
        run.close()


def peak_of(expansion: Expansion) -> int:
    """Live bytes of a program's own storages at their highest."""
    sizes: list[int] = []
    live = peak = 0
    for _, events in expansion.events():
        for event in events:
            if event >= 0:
                sizes.append(rounded(event) if event else 0)
                live += sizes[-1]
                peak = max(peak, live)
            else:
                live -= sizes[~event]
    return peak


def survivors_of(expansion: Expansion) -> int:
    """How many storages outlive a program."""
    list(expansion.events())
    return len(expansion.survivors)


def dry_peak(trace: Trace, config: TrainingConfig) -> int:
    resident = sum(rounded(one.size_bytes) for one in trace.residents)
    optimizer = trace.expand_optimizer(0)
    list(optimizer.events())
    state = sum(rounded(optimizer.size_of(slot)) for slot in optimizer.survivors)
    return resident + state + peak_of(trace.expand("first", config.micro_batch_size, config.sequence_length))


def both_bytes(trace: Trace, config: TrainingConfig) -> tuple[int, int]:
    forecast = forecast_memory(trace, config, CUDA)
    return forecast.peak_allocated_bytes, forecast.peak_reserved_bytes


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # peft says it of Mixtral's experts
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_dry_peak_is_the_real_steps(kind: str, checkpointing: str, tmp_path: Any) -> None:
    source, config = a_model(kind), a_dry_config(kind, gradient_checkpointing=checkpointing)
    assert dry_peak(dry_trace(source, config), config) == pytest.approx(
        real_peak(source, config, str(tmp_path)), rel=0.005
    )


#: Each stands for code of its own: a loss path, a checkpointing mode, a dtype that goes where others do not.
SETTINGS: list[dict[str, Any]] = [
    {"gradient_checkpointing": "full", "reentrant": True},
    {"gradient_checkpointing": "every_2", "micro_batch_size": 3, "sequence_length": 100},
    {"gradient_checkpointing": "full", "loss": LossPath.CHUNKED, "sequence_length": 512},
    {"gradient_checkpointing": "full", "loss": LossPath.CHUNKED, "trainer": Trainer.TRL},
    {"trainer": Trainer.LOOP, "autocast": False, "compute_dtype": "float16"},
    {"upcast": Upcast.FP32, "lora_dropout": 0.1, "attention": "eager"},
    {"upcast": Upcast.NORMS, "double_quant": False, "micro_batch_size": 1},
    {"quantization": Quantization.NONE, "upcast": Upcast.FP32, "autocast": False},
    {"adapter_dtype": "bfloat16", "optimizer": "adamw_8bit", "target_modules": ("q_proj", "v_proj")},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_dry_peak_is_the_real_steps_in_other_settings(changes: dict[str, Any], tmp_path: Any) -> None:
    source, config = a_model("llama"), a_dry_config(**changes)
    assert dry_peak(dry_trace(source, config), config) == pytest.approx(
        real_peak(source, config, str(tmp_path)), rel=0.002
    )


@pytest.mark.parametrize(
    ("kind", "checkpointing", "layers"),
    [("llama", "full", 14), ("gemma2", "off", 14), ("llama", "every_2", 14), ("gemma3_text", "full", 34)],
)
def test_few_layers_stand_for_all_to_the_byte(kind: str, checkpointing: str, layers: int) -> None:
    source = a_model(kind, num_hidden_layers=layers)
    config = a_dry_config(kind, gradient_checkpointing=checkpointing)
    point = [(config.micro_batch_size, config.sequence_length)]
    few = tracing._traced(source, config, CUDA, point, False)
    every = tracing._traced(source, config, CUDA, point, True)
    assert few.loops["layers"].kept < every.loops["layers"].kept == layers
    assert both_bytes(few, config) == both_bytes(every, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "off"},
        {"gradient_checkpointing": "full", "attention": "eager"},
        {"gradient_checkpointing": "offload", "attention": "flash_attention_2"},
        {"gradient_checkpointing": "every_2"},
        {"gradient_checkpointing": "full", "loss": "chunked", "sequence_length": 1024},
        {"gradient_checkpointing": "off", "loss": "chunked", "sequence_length": 1024, "attention": "flash_attention_2"},
        {"gradient_checkpointing": "full", "packing": True, "attention": "flash_attention_2"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_a_trace_holds_at_other_points_to_the_byte(changes: dict[str, Any]) -> None:
    source, config = a_model("llama", max_position_embeddings=1 << 20), a_dry_config(**changes)
    general = tracing._traced(source, config, CUDA, tracing._points(config, source), False)
    own = tracing._traced(source, config, CUDA, [(config.micro_batch_size, config.sequence_length)], False)
    assert general.point is None
    assert both_bytes(general, config) == both_bytes(own, config)


#: (model, its changes, settings): each a class of points of its own.
CLASSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "biases": ("qwen2", {}, {"micro_batch_size": 1, "sequence_length": 1000}),
    "one kind of bias": ("gpt2", {}, {"sequence_length": 1000}),
    "below a window": ("mistral", {"sliding_window": 1024}, {"micro_batch_size": 1, "sequence_length": 256}),
    "above a window": ("mistral", {"sliding_window": 1024}, {"sequence_length": 2048}),
    "chunks above a window": (
        "mistral",
        {"sliding_window": 1024},
        {"sequence_length": 2048, "loss": LossPath.CHUNKED},
    ),
    "two kinds of layers": ("gemma3_text", {"num_hidden_layers": 34, "sliding_window": 512}, {"sequence_length": 2048}),
    "one tile": ("llama", {}, {"sequence_length": 1000, "loss": LossPath.CHUNKED, "trainer": Trainer.TRL}),
    "tiles": (
        "llama",
        {},
        {"micro_batch_size": 1, "sequence_length": 8192, "loss": LossPath.CHUNKED, "trainer": Trainer.TRL},
    ),
}


@pytest.mark.parametrize(("kind", "model", "settings"), CLASSES.values(), ids=CLASSES)
def test_a_trace_of_its_class_is_that_of_its_point(kind: str, model: dict[str, Any], settings: dict[str, Any]) -> None:
    source = a_model(kind, max_position_embeddings=1 << 20, **model)
    config = a_dry_config(gradient_checkpointing="full", **settings)
    general = tracing.make_trace(source, config, CUDA)
    own = tracing.make_trace(source, config, CUDA, own_point=True)
    assert general.point is None
    assert forecast_memory(general, config, CUDA) == forecast_memory(own, config, CUDA)
    card = find_card("RTX 4090").card
    assert forecast_time(general, config, card).step_time_s == pytest.approx(
        forecast_time(own, config, card).step_time_s, rel=0.005
    )


def test_an_evaluation_of_another_batch_size_is_its_own() -> None:
    source = a_model("llama")
    config = a_dry_config(micro_batch_size=1, eval_micro_batch_size=8)
    several = replace(config, micro_batch_size=8, eval_micro_batch_size=None)
    trace, evaluation = (tracing.make_trace(source, one, CUDA) for one in (config, several))
    alone = forecast_memory(trace, config, CUDA)
    both = forecast_memory(trace, config, CUDA, evaluation=evaluation)
    assert alone.evaluation_peak_allocated_bytes is None
    evaluated = both.evaluation_peak_allocated_bytes
    assert evaluated == forecast_memory(evaluation, several, CUDA).evaluation_peak_allocated_bytes
    assert both.peak_allocated_bytes == max(alone.peak_allocated_bytes, evaluated or 0)


def test_fewer_chunks_than_were_traced_take_hardly_less() -> None:
    source, config = a_model("llama"), a_dry_config(loss=LossPath.CHUNKED, gradient_checkpointing="full")
    general = tracing._traced(source, config, CUDA, tracing._points(config, source), False)
    own = tracing._traced(source, config, CUDA, [(2, 128)], False)
    (most, reserved), (least, reserved_too) = both_bytes(general, config), both_bytes(own, config)
    assert least <= most <= least * 1.01
    assert reserved == reserved_too
    with pytest.raises(NotAlike):
        general.expand("first", 1, 128)  # half a chunk


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_accumulation_follows_from_the_first_micro_batch(checkpointing: str) -> None:
    source, config = a_model("llama"), a_dry_config(gradient_checkpointing=checkpointing)
    run = DryRun(source, config, CUDA)
    try:
        point = run.trace(2, 128, accumulates=True, evaluates=False)
        trace = tracing._distilled(run, config, [(2, 128)], [point])
    finally:
        run.close()
    trace.programs["traced"] = fit(
        [raw_blocks(point.programs["next"])], _constants(trace), checkpointed=checkpointing != "off"
    )
    derived = peak_of(trace.expand("next", 2, 128))
    assert derived == pytest.approx(peak_of(trace.expand("traced", 2, 128)), rel=0.001)
    assert derived <= peak_of(trace.expand("first", 2, 128))
    assert survivors_of(trace.expand("next", 2, 128)) == survivors_of(trace.expand("traced", 2, 128)) == 0
    assert survivors_of(trace.expand("first", 2, 128)) == sum(one.part == "adapters" for one in trace.residents)


def _constants(trace: Trace) -> SizeTable:
    """A table of one point that goes on filling the sizes of `trace`."""
    table = SizeTable([(2, 128)])
    table.sizes = trace.sizes
    table._known = {size: number for number, size in enumerate(trace.sizes)}
    return table


def test_rows_laid_end_to_end_take_what_filled_rows_take() -> None:
    source = a_model("llama")
    config = a_dry_config(gradient_checkpointing="full", attention="flash_attention_2", micro_batch_size=4)
    packed = replace(config, packing=True)
    point = [(4, 128)]
    rows, free = (tracing._traced(source, one, CUDA, point, False) for one in (config, packed))
    assert both_bytes(free, packed)[0] == pytest.approx(both_bytes(rows, config)[0], rel=0.01)
    assert flops_of(free, packed) == pytest.approx(flops_of(rows, config))  # each row attends to itself alone


def flops_of(trace: Trace, config: TrainingConfig) -> int:
    values = monomials(config.micro_batch_size, config.sequence_length)
    works = [work for block in trace.programs["first"] for work in block.works]
    return sum(work.count * size.at(values) for work in works for size in work.flops)


#: Bytes of state to one parameter: 8-bit states carry a float32 scale for 256 of them, small tensors stay 32-bit.
STATE = {
    "adamw_torch": (8, 8.3),
    "adamw_torch_fused": (8, 8.3),
    "adamw_8bit": (2, 6),
    "adamw_bnb_8bit": (2, 6),
    "adafactor": (0.01, 1),
    "adagrad": (4, 4.2),
    "ademamix": (12, 12.2),
    "sgd": (0, 0),
    "lion_8bit": (1, 3),
    "lion_32bit": (4, 4),
    "rmsprop": (4, 4.2),
}


@pytest.mark.parametrize("name", STATE)
def test_optimizers_leave_their_state(name: str) -> None:
    run = DryRun(a_model("llama", num_hidden_layers=2), a_dry_config(optimizer=name), CUDA)
    table = SizeTable([(1, 1)])
    try:
        parameters = sum(run.adapters()) / 4
        blocks = fit([raw_blocks(run.optimizer()[0])], table, checkpointed=False)
    finally:
        run.close()
    expansion = Expansion(blocks, {}, {}, [size.at((1,) * len(MONOMIALS)) for size in table.sizes])
    list(expansion.events())
    least, most = STATE[name]
    assert least <= sum(map(expansion.size_of, expansion.survivors)) / parameters <= most


def test_parts_sum_to_the_peak_and_documents_hold_all_of_a_trace() -> None:
    source, config = a_model("llama"), a_dry_config(gradient_checkpointing="full")
    trace = tracing._traced(source, config, CUDA, tracing._points(config, source), False)
    forecast = forecast_memory(trace, config, CUDA)
    assert sum(forecast.parts.values()) == forecast.peak_allocated_bytes
    assert min(forecast.parts.values()) > 0
    assert {"base weights", "adapters", "optimizer state"} <= set(forecast.parts)
    again = from_document(json.loads(json.dumps(to_document(trace))))
    assert again == trace
    assert forecast_memory(again, config, CUDA) == forecast
    assert forecast.peak_allocated_bytes % ROUNDING == 0
