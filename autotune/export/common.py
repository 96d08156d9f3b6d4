"""What every trainer of the Hugging Face family is told in the same words."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any

from autotune.errors import InvalidRequest
from autotune.values import AllocatorSetting, Quantization, Trainer, TrainingConfig, Upcast

#: What these words were checked against; taken where a package is not installed.
CHECKED_VERSIONS = {"transformers": "5.23.0", "trl": "1.16.0", "torch": "2.13.0"}

#: when ("launch", "data", "model" loaded, "adapters" added, "trainer" defined, "note"), why, code (may be empty).
Step = dict[str, str]

_CASTS = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}  # methods of a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """The packages that the export is for."""

    transformers: str
    torch: str
    trl: str | None = None  # None: not involved

    def release(self, package: str) -> tuple[int, int]:
        """Major and minor number. Raises InvalidRequest for text that has none."""
        text = str(getattr(self, package))
        match = re.match(r"(\d+)\.(\d+)", text)
        if match is None:
            raise InvalidRequest(f"{package} version {text!r} is no version; give one such as 5.23.0")
        return int(match[1]), int(match[2])


def version_of(package: str, given: str | None) -> str:
    """`given`, else the installed version (its metadata is read, nothing is imported), else the one checked against."""
    if given is not None:
        return given
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return CHECKED_VERSIONS[package]


def batch(config: TrainingConfig) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_micro_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }


def precision(config: TrainingConfig) -> dict[str, bool]:
    """Autocast is what bf16 and fp16 switch on; both are said, because trl's default for bf16 is on."""
    return {
        "bf16": config.autocast and config.compute_dtype == "bfloat16",
        "fp16": config.autocast and config.compute_dtype == "float16",
    }


def checkpointing(config: TrainingConfig, versions: Versions) -> dict[str, Any]:
    """transformers 5.23 renamed the setting and learned partial and offloaded checkpointing.

    Raises InvalidRequest where these are asked of an older one. "off" is said, because trl's default is on.
    """
    new = versions.release("transformers") >= (5, 23)
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    mode = config.gradient_checkpointing
    if mode == "off":
        return {name: False}
    if mode != "full" and not new:
        raise InvalidRequest(
            f"transformers {versions.transformers} has no setting for gradient_checkpointing {mode};"
            " upgrade transformers to 5.23 or newer, or set it to full in the fit file"
        )
    kwargs: dict[str, Any] = {"use_reentrant": config.reentrant}
    if mode == "offload":
        kwargs["offload"] = True
    elif mode != "full":
        kwargs["every_n_layers"] = int(mode.removeprefix("every_"))
    return {name: True, f"{name}_kwargs": kwargs}


def quantization_config(config: TrainingConfig) -> dict[str, Any] | None:
    """Arguments of BitsAndBytesConfig; None where nothing is quantised."""
    if config.quantization is Quantization.NONE:
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.quantization.value,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": config.compute_dtype,
    }


def lora_config(config: TrainingConfig) -> dict[str, Any]:
    """Arguments of peft's LoraConfig."""
    targets = list(config.target_modules)
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def model_kwargs(config: TrainingConfig) -> dict[str, str]:
    """Arguments of from_pretrained, the quantization apart."""
    return {"attn_implementation": config.attention.value, "dtype": config.compute_dtype}


def environment(config: TrainingConfig, versions: Versions) -> dict[str, str]:
    """Variables to set before torch is imported.

    torch 2.9 has the name PYTORCH_ALLOC_CONF and ignores this setting in it; 2.11 does not (pytorch issue 183387).
    """
    if config.allocator is AllocatorSetting.DEFAULT:
        return {}
    name = "PYTORCH_ALLOC_CONF" if versions.release("torch") >= (2, 11) else "PYTORCH_CUDA_ALLOC_CONF"
    return {name: "expandable_segments:True"}


def launch_steps(config: TrainingConfig, trainer: Trainer) -> list[Step]:
    """How to start it so that the effective batch size is the fitted one."""
    count = config.world_size
    if count == 1:
        why = f"effective batch size {config.effective_batch_size} on one GPU: a trainer counts every GPU that it sees"
        steps = [{"when": "launch", "why": why, "code": "CUDA_VISIBLE_DEVICES=0 python train.py"}]
    else:
        why = f"effective batch size {config.effective_batch_size} over {count} GPUs, one process each"
        steps = [{"when": "launch", "why": why, "code": f"torchrun --nproc_per_node {count} train.py"}]
    if config.trainer is not trainer:
        why = (
            f"this config was fitted with the step of {config.trainer.value}: memory and speed under {trainer.value}"
            f" are near, not proven; fit again with --trainer {trainer.value} to prove them"
        )
        steps.append({"when": "note", "why": why, "code": ""})
    return steps


def upcast_steps(config: TrainingConfig) -> list[Step]:
    """The preparation before adapters are added; checkpointing is left to the trainer's own setting."""
    if config.upcast is Upcast.NONE:
        return []
    lines = [
        "from peft import prepare_model_for_kbit_training",
        "model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)",
    ]
    if config.upcast is Upcast.FP32:
        why = "everything that is not 4-bit in float32 (upcast: fp32)"
    else:
        why = "norms in float32, embedding and head back in 16 bits (upcast: norms)"
        lines += [
            "for parameter in model.parameters():",
            "    if parameter.is_floating_point() and parameter.ndim >= 2:",
            f"        parameter.data = parameter.data.{_CASTS[config.compute_dtype]}()",
        ]
    return [{"when": "model", "why": why, "code": "\n".join(lines)}]


def adapter_steps(config: TrainingConfig, native: str, model: str = "model") -> list[Step]:
    """A cast of the adapters, where the trainer leaves them in another dtype (`native`) than the fitted one."""
    if config.adapter_dtype == native:
        return []
    lines = [
        f"for parameter in {model}.parameters():",
        "    if parameter.requires_grad:",
        f"        parameter.data = parameter.data.{_CASTS[config.adapter_dtype]}()",
    ]
    why = f"adapters in {config.adapter_dtype}, not in {native}"
    return [{"when": "adapters", "why": why, "code": "\n".join(lines)}]


def code_of(document: dict[str, Any], when: str) -> str:
    """The code of the steps of one moment, for a script."""
    return "\n".join(step["code"] for step in document["steps"] if step["when"] == when and step["code"])
