"""The exported words are ones that the real classes accept, and the values arrive; the scripts train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from autotune.errors import InvalidRequest
from autotune.export import FORMATS, render, to_transformers, to_trl
from autotune.values import (
    AllocatorSetting,
    Attention,
    LossPath,
    Quantization,
    Trainer,
    TrainingConfig,
    Upcast,
)

START = TrainingConfig(sequence_length=512, micro_batch_size=2, gradient_accumulation_steps=8)
TRL = replace(START, trainer=Trainer.TRL, loss=LossPath.CHUNKED, adapter_dtype="bfloat16")
NEW = {"transformers_version": "5.23.0", "torch_version": "2.13.0"}
OLD = {"transformers_version": "4.57.6", "torch_version": "2.8.0"}

#: Differences from a start config that both trainers can express.
CHANGES: list[dict[str, Any]] = [
    {},
    {"gradient_checkpointing": "full"},
    {"gradient_checkpointing": "full", "reentrant": True},
    {"gradient_checkpointing": "every_3"},
    {"gradient_checkpointing": "offload"},
    {"eval_micro_batch_size": 1, "micro_batch_size": 4, "gradient_accumulation_steps": 3, "world_size": 2},
    {"optimizer": "paged_adamw_8bit"},
    {"optimizer": "adamw_bnb_8bit"},
    {"compute_dtype": "float16", "double_quant": False},
    {"compute_dtype": "float32", "attention": Attention.EAGER},
    {"autocast": False, "upcast": Upcast.FP32},
    {"quantization": Quantization.NONE, "adapter_dtype": "float32", "packing": True},
    {"lora_rank": 8, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ("q_proj", "v_proj")},
    {"allocator": AllocatorSetting.EXPANDABLE_SEGMENTS, "upcast": Upcast.NORMS},
]


def steps(document: dict[str, Any]) -> dict[str, str]:
    """Code of each moment."""
    return {step["when"]: step["code"] for step in document["steps"]}


def check_arguments(made: Any, config: TrainingConfig) -> None:
    """The values of `config`, read where the trainer reads them."""
    per_step = made.per_device_train_batch_size * made.gradient_accumulation_steps
    assert per_step * config.world_size == config.effective_batch_size
    assert made.per_device_train_batch_size == config.micro_batch_size
    assert made.per_device_eval_batch_size == (config.eval_micro_batch_size or config.micro_batch_size)
    assert made.optim == config.optimizer
    assert made.bf16 == (config.autocast and config.compute_dtype == "bfloat16")
    assert made.fp16 == (config.autocast and config.compute_dtype == "float16")
    assert made.activation_checkpointing == (config.gradient_checkpointing != "off")
    kwargs = made.activation_checkpointing_kwargs or {}
    assert kwargs.get("offload", False) == (config.gradient_checkpointing == "offload")
    every = config.gradient_checkpointing.startswith("every_")
    assert kwargs.get("every_n_layers", 1) == (3 if every else 1)
    assert kwargs.get("use_reentrant", False) == config.reentrant


def check_objects(document: dict[str, Any], config: TrainingConfig) -> None:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    lora = LoraConfig(**document["lora_config"])
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (config.lora_rank, config.lora_alpha, config.lora_dropout)
    all_linear = config.target_modules == ("all-linear",)
    assert lora.target_modules == ("all-linear" if all_linear else set(config.target_modules))
    assert document["model_kwargs"]["attn_implementation"] == config.attention.value
    assert getattr(torch, document["model_kwargs"]["dtype"]) is getattr(torch, config.compute_dtype)
    if config.quantization is Quantization.NONE:
        assert document["quantization_config"] is None
        return
    quantization = BitsAndBytesConfig(**document["quantization_config"])
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant == config.double_quant
    assert quantization.bnb_4bit_compute_dtype is getattr(torch, config.compute_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_training_arguments_take_every_value(change: dict[str, Any], tmp_path: Path) -> None:
    from transformers import TrainingArguments

    config = replace(START, **change)
    document = to_transformers(config, "org/model")
    check_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **document["training_arguments"]), config)
    check_objects(document, config)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_sft_config_takes_every_value(change: dict[str, Any], tmp_path: Path) -> None:
    from trl import SFTConfig

    config = replace(TRL, **change)
    document = to_trl(config, "org/model")
    made = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **document["sft_config"])
    check_arguments(made, config)
    check_objects(document, config)
    assert (made.max_length, made.packing, made.loss_type) == (config.sequence_length, config.packing, "nll")
    assert made.packing_strategy == ("wrapped" if config.packing else "bfd")


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize(("export", "start"), [(to_transformers, START), (to_trl, TRL)])
def test_every_form_holds_the_same_document(change: dict[str, Any], export: Any, start: TrainingConfig) -> None:
    document = export(replace(start, **change), 'org/model "\\x" """')
    assert yaml.safe_load(render(document, "yaml")) == document
    assert json.loads(render(document, "json")) == document
    scope: dict[str, Any] = {}
    exec(compile(constants(render(document, "python")), "script", "exec"), scope)
    assert scope["MODEL"] == document["model"]
    assert scope["LORA_CONFIG"] == document["lora_config"]
    assert scope["MODEL_KWARGS"] == document["model_kwargs"]
    assert scope.get("QUANTIZATION_CONFIG") == document["quantization_config"]
    assert all(render(document, form).endswith("\n") for form in FORMATS)


def constants(source: str) -> Any:
    """The script's constants alone: no import, no function."""
    import ast

    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return tree


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="format must be one of yaml, json, python"):
        render(to_trl(TRL, "m"), "toml")


def test_checkpointing_is_spelt_by_version() -> None:
    config = replace(START, gradient_checkpointing="full")
    new = to_transformers(config, "m", **NEW)["training_arguments"]
    old = to_transformers(config, "m", **OLD)["training_arguments"]
    assert new["activation_checkpointing_kwargs"] == old["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert "gradient_checkpointing" not in new
    assert "activation_checkpointing" not in old
    assert to_transformers(START, "m", **OLD)["training_arguments"]["gradient_checkpointing"] is False


@pytest.mark.parametrize("mode", ["every_2", "offload"])
@pytest.mark.parametrize("export", [to_transformers, to_trl])
def test_older_transformers_have_no_partial_checkpointing(mode: str, export: Any) -> None:
    config = replace(TRL, gradient_checkpointing=mode)
    with pytest.raises(InvalidRequest, match=r"transformers 5\.22\.0 has no setting .* upgrade transformers to 5\.23"):
        export(config, "m", transformers_version="5.22.0")


def test_reentrant_checkpointing_asks_older_transformers_for_input_gradients() -> None:
    config = replace(START, gradient_checkpointing="full", reentrant=True)
    assert steps(to_transformers(config, "m", **OLD))["adapters"] == "model.enable_input_require_grads()"
    assert "adapters" not in steps(to_transformers(config, "m", **NEW))


@pytest.mark.parametrize(
    ("torch_version", "variable"),
    [
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.11.0", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_allocator_is_set_by_the_name_that_works(torch_version: str, variable: str) -> None:
    config = replace(START, allocator=AllocatorSetting.EXPANDABLE_SEGMENTS)
    document = to_transformers(config, "m", torch_version=torch_version)
    assert document["environment"] == {variable: "expandable_segments:True"}
    source = render(document, "python")
    assert source.index(variable) < source.index("from transformers import")
    assert to_transformers(START, "m")["environment"] == {}


@pytest.mark.parametrize(
    ("trl_version", "loss", "expected"),
    [
        ("1.16.0", LossPath.CHUNKED, {"loss_type": "nll"}),
        ("1.14.0", LossPath.CHUNKED, {"loss_type": "chunked_nll"}),
        ("1.14.0", LossPath.FULL, {"loss_type": "nll"}),
        ("1.14.0", LossPath.LIGER, {"use_liger_kernel": True}),
        ("0.26.0", LossPath.FULL, {}),
    ],
)
def test_trl_is_told_the_measured_loss(trl_version: str, loss: LossPath, expected: dict[str, Any]) -> None:
    section = to_trl(replace(TRL, loss=loss), "m", trl_version=trl_version)["sft_config"]
    assert {key: section[key] for key in ("loss_type", "use_liger_kernel") if key in section} == expected


@pytest.mark.parametrize(
    ("trl_version", "change", "message"),
    [
        ("1.16.0", {"loss": LossPath.FULL}, "no loss over the full logits"),
        ("1.15.0", {"loss": LossPath.LIGER}, "keeps its own chunked loss"),
        ("1.3.0", {"loss": LossPath.CHUNKED}, r"no chunked loss; upgrade trl to 1\.4"),
        ("0.25.0", {"loss": LossPath.FULL}, r"upcasts the norms .* upcast none; upgrade trl to 0\.26"),
        ("new", {}, "trl version 'new' is no version"),
    ],
)
def test_what_trl_cannot_do_is_refused(trl_version: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        to_trl(replace(TRL, **change), "m", trl_version=trl_version)


def test_older_trl_prepares_a_quantised_model_itself() -> None:
    config = replace(TRL, loss=LossPath.FULL, upcast=Upcast.NORMS, adapter_dtype="float32")
    document = to_trl(config, "m", trl_version="0.25.0", **OLD)
    assert set(steps(document)) == {"launch"}
    assert document["sft_config"]["max_length"] == 512
    assert to_trl(config, "m", trl_version="0.15.2", **OLD)["sft_config"]["max_seq_length"] == 512


def test_packing_by_best_fit_needs_flash_attention() -> None:
    config = replace(TRL, packing=True, attention=Attention.FLASH_ATTENTION_2)
    assert to_trl(config, "m")["sft_config"]["packing_strategy"] == "bfd"


def test_adapters_are_cast_where_the_trainer_has_another_dtype() -> None:
    assert "adapters" not in steps(to_trl(TRL, "m"))
    assert "trainer.model.parameters()" in steps(to_trl(replace(TRL, adapter_dtype="float32"), "m"))["adapters"]
    assert "adapters" not in steps(to_transformers(START, "m"))
    assert "data.bfloat16()" in steps(to_transformers(replace(START, adapter_dtype="bfloat16"), "m"))["adapters"]


def test_an_upcast_is_a_step_that_leaves_checkpointing_alone() -> None:
    document = to_transformers(replace(START, upcast=Upcast.FP32), "m")
    assert "prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)" in steps(document)["model"]
    assert "model" not in steps(to_transformers(START, "m"))


def test_a_config_of_another_trainer_says_so() -> None:
    assert "fitted with the step of trl" in str(to_transformers(TRL, "m")["steps"])
    assert "fitted with the step of transformers" in str(to_trl(replace(START, loss=LossPath.CHUNKED), "m")["steps"])
    assert "note" not in steps(to_trl(TRL, "m"))


def test_transformers_computes_the_measured_loss() -> None:
    chunked = replace(START, loss=LossPath.CHUNKED)
    assert "class ChunkedLossTrainer(Trainer):" in steps(to_transformers(chunked, "m"))["trainer"]
    liger = to_transformers(replace(START, loss=LossPath.LIGER), "m")
    assert liger["training_arguments"]["use_liger_kernel"] is True
    with pytest.raises(InvalidRequest, match="no chunked loss"):
        to_transformers(replace(chunked, world_size=2), "m")


def test_several_gpus_are_started_as_processes() -> None:
    config = replace(START, world_size=4)
    assert steps(to_transformers(config, "m"))["launch"] == "torchrun --nproc_per_node 4 train.py"


# The scripts, run on the CPU with a model of three layers on disk.

LAYERS = 3
TOKENS = 64


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def run(source: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "script"}
    exec(compile(source, "script", "exec"), scope)
    return scope


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    import random

    chance = random.Random(0)
    rows = [[chance.randrange(512) for _ in range(TOKENS)] for _ in range(16)]
    return [{"input_ids": row, "attention_mask": [1] * TOKENS, "labels": row} for row in rows]


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def trained(trainer: Any) -> list[float]:
    """Losses of the run's steps; the adapters must have moved."""
    trainer.args.logging_steps = trainer.state.logging_steps = 1
    before = [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.train()
    after = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert any((one != other).any() for one, other in zip(before, after, strict=True))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def checkpointed_layers(model: Any) -> list[bool]:
    layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    return [bool(layer.gradient_checkpointing) for layer in layers]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [LossPath.FULL, LossPath.CHUNKED])
def test_the_transformers_script_trains(
    model_folder: Path, rows: list[dict[str, list[int]]], quick: dict[str, Any], loss: LossPath
) -> None:
    import torch

    config = TrainingConfig(
        sequence_length=TOKENS,
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing="every_2",
        loss=loss,
        upcast=Upcast.NORMS,
    )
    script = run(render(to_transformers(config, str(model_folder)), "python"))
    trainer = script["make_trainer"](script["training_arguments"](**quick), train_dataset=rows, eval_dataset=rows[:2])
    losses = trained(trainer)
    assert losses[0] == pytest.approx(6.24, abs=0.2)  # ln 512
    assert checkpointed_layers(trainer.model) == [True, False, True]
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "embed" in name or "lm_head" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.float32}
    assert trainer.evaluate()["eval_loss"] < losses[0] + 0.1


@pytest.mark.slow
def test_both_loss_paths_of_the_transformers_script_are_one_loss(
    model_folder: Path, rows: list[dict[str, list[int]]], quick: dict[str, Any]
) -> None:
    losses = []
    for loss in (LossPath.FULL, LossPath.CHUNKED):
        config = TrainingConfig(sequence_length=TOKENS, micro_batch_size=2, gradient_accumulation_steps=4, loss=loss)
        script = run(render(to_transformers(config, str(model_folder)), "python"))
        from transformers import set_seed

        set_seed(0)
        losses.append(trained(script["make_trainer"](script["training_arguments"](**quick), train_dataset=rows)))
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.slow
def test_the_trl_script_trains(model_folder: Path, rows: list[dict[str, list[int]]], quick: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = replace(
        TRL, sequence_length=TOKENS, gradient_checkpointing="full", adapter_dtype="float32", upcast=Upcast.FP32
    )
    words = Tokenizer(models.WordLevel({str(token): token for token in range(512)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2")
    script = run(render(to_trl(config, str(model_folder)), "python"))
    trainer = script["make_trainer"](
        script["sft_config"](**quick),
        train_dataset=Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows]}),
        processing_class=tokenizer,
    )
    assert trained(trainer)[0] == pytest.approx(6.24, abs=0.2)
    assert checkpointed_layers(trainer.model) == [True] * LAYERS
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    assert dtypes == {torch.uint8, torch.float32}
