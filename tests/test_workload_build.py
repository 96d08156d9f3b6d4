"""Models are built from their config alone, 4-bit from the start, on meta and on the CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from autotune.values import ModelSource, Quantization, TrainingConfig
from autotune.workload.build import UnsupportedModel, build_base
from autotune.workload.models import resolve_model
from autotune.workload.step import TrainingStep
from autotune.workload.tracking import LiveBytes, model_tensors
from tests.tiny import CONFIG, MODEL, a_config

META, CPU = torch.device("meta"), torch.device("cpu")
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_and_scales_dequantise_to_sane_weights(double_quant: bool) -> None:
    import bitsandbytes as bnb

    base = build_base(MODEL, a_config(double_quant=double_quant), CPU)
    layer = base.model.model.layers[0].mlp.up_proj
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert weight.shape == (384, 128)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.15)
    assert abs(float(weight.mean())) < 0.002


def test_building_never_holds_the_16_bit_model() -> None:
    """The peak while building stays below what the finished 4-bit model and one embedding take."""
    source = ModelSource(
        name="wide", config={**CONFIG, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    )
    gc.collect()
    tracker = LiveBytes("cpu")
    with tracker:
        base = build_base(source, a_config(), CPU)
    final = LiveBytes()
    final.see(model_tensors(base.model))
    linear = sum(m.in_features * m.out_features for m in base.model.modules() if type(m).__name__ == "Linear4bit")
    assert tracker.peak_bytes < final.live_bytes + linear // 4  # the 16-bit weights would add 2 × linear


def test_a_70b_model_is_built_on_meta_without_memory() -> None:
    source = resolve_model("meta-llama/Llama-3.3-70B-Instruct")
    base = build_base(source, TrainingConfig(sequence_length=64, micro_batch_size=1), META)
    assert base.parameters == 70_553_706_496
    assert {parameter.device.type for parameter in base.model.parameters()} == {"meta"}


def test_experts_held_as_3d_parameters_stay_16_bit_and_are_counted() -> None:
    base = build_base(ModelSource(name="moe", config=MIXTRAL), a_config(), CPU)
    experts = 2 * 4 * 3 * 128 * 256  # layers × experts × (gate, up, down)
    assert base.unquantized_bytes == experts * 2
    assert build_base(MODEL, a_config(), CPU).unquantized_bytes == 0


def test_16_bit_lora_quantises_nothing() -> None:
    base = build_base(MODEL, a_config(quantization=Quantization.NONE), CPU)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "no-such-architecture"}, "does not know"),
        ({**CONFIG, "num_hidden_layers": 0}, "no linear layer"),
        ({**CONFIG, "num_attention_heads": 7}, "refuses|cannot build"),
        ({**CONFIG, "hidden_act": "no_such_activation"}, "cannot build"),
        ({**CONFIG, "layer_types": ["odd", "odd"]}, "refuses .*layer_types.* must be"),  # its second line
    ],
)
def test_models_that_cannot_be_built_are_refused_with_the_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        build_base(ModelSource(name="odd", config=config), a_config(), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw_torch"},
        {"optimizer": "adamw_bnb_8bit"},
        {"optimizer": "paged_adamw_8bit"},
        {"optimizer": "paged_adamw_32bit"},
        {"attention": "eager"},
        {"loss": "chunked"},
        {"gradient_checkpointing": "every_2"},
        {"gradient_checkpointing": "full", "reentrant": True},
        {"upcast": "fp32"},
        {"upcast": "norms"},
        {"double_quant": False},
        {"quantization": "none"},
        {"autocast": False},
        {"compute_dtype": "float32"},
        {"target_modules": ("q_proj", "v_proj")},
        {"adapter_dtype": "bfloat16"},
        {"lora_dropout": 0.1},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_setting_trains_evaluates_and_leaves_a_bare_model(changes: dict[str, Any], tmp_path: Any) -> None:
    config = a_config(**changes)
    base = build_base(MODEL, config, CPU)
    step = TrainingStep(base, config, folder=str(tmp_path))
    before = [parameter.detach().clone() for parameter in step.trainable]
    step.prime_optimizer()
    assert all(torch.equal(old, new) for old, new in zip(before, step.trainable, strict=True))
    batches = step.batches(2)
    items = step.items_in(batches)
    losses = [float(step.micro_batch(batch, items)) for batch in batches]
    step.optimizer_step()
    assert all(0 < loss < 20 for loss in losses)
    assert sum(losses) == pytest.approx(8.3, abs=1.0)  # ln 4096, summed over the step's micro batches
    assert step.optimizer_state_bytes > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, step.trainable, strict=True))
    assert 0 < step.evaluate() < 20
    assert step.save(str(tmp_path)) > 0
    bare = step.close()
    assert not any("lora" in name for name, _ in bare.named_parameters())


def test_chunked_loss_is_the_full_loss(tmp_path: Any) -> None:
    losses = {}
    for path in ("full", "chunked"):
        config = a_config(loss=path, autocast=False, compute_dtype="float32", sequence_length=512)
        step = TrainingStep(build_base(MODEL, config, CPU), config, folder=str(tmp_path))
        (batch,) = step.batches(1)
        losses[path] = float(step.micro_batch(batch, step.items_in([batch])))
    assert losses["chunked"] == pytest.approx(losses["full"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "no_such_optimizer"}, "no_such_optimizer"),
        ({"target_modules": ("no_such",)}, "no_such"),
        ({"target_modules": ("q_proj", "no_such")}, "no module no_such"),
        ({"loss": "liger"}, "needs a GPU"),
        ({"attention": "flash_attention_2"}, "flash_attention_2|[Ff]lash"),
    ],
)
def test_settings_that_cannot_run_here_are_refused(changes: dict[str, Any], words: str, tmp_path: Any) -> None:
    config = a_config(**changes)
    with pytest.raises(UnsupportedModel, match=words):
        TrainingStep(build_base(MODEL, config, CPU), config, folder=str(tmp_path))


def test_a_kept_base_peaks_as_a_fresh_one_whatever_ran_on_it_before(tmp_path: Any) -> None:
    """A warm worker on a GPU keeps the base from config to config."""

    def peak(base: Any, changes: dict[str, Any]) -> int:
        config = a_config(sequence_length=128, **changes)
        step = TrainingStep(base, config, folder=str(tmp_path))
        step.prime_optimizer()
        (batch,) = step.batches(1)
        tracker = LiveBytes("cpu")
        tracker.see([*model_tensors(step.model), *step.optimizer_tensors(), *batch.values()])
        with tracker:
            step.micro_batch(batch, step.items_in([batch]))
        step.close()
        del step
        gc.collect()
        return tracker.peak_bytes

    kept = build_base(MODEL, a_config(), CPU)
    sequence: list[dict[str, Any]] = [
        {"gradient_checkpointing": "full"},
        {},
        {"attention": "eager", "lora_rank": 8},
        {"gradient_checkpointing": "every_2", "loss": "chunked"},
        {"optimizer": "adamw_bnb_8bit"},
        {"gradient_checkpointing": "full", "reentrant": True},
        {},
    ]
    for changes in sequence:
        assert peak(kept, changes) == peak(build_base(MODEL, a_config(), CPU), changes), changes
