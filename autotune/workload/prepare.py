"""What a trainer does to the base model before the first step: dtypes, adapters, checkpointing, optimizer."""

from __future__ import annotations

import re
from typing import Any

import torch

from autotune.values import Attention, LossPath, Trainer, TrainingConfig, Upcast
from autotune.workload.build import UnsupportedModel


def add_adapters(model: Any, config: TrainingConfig) -> Any:
    """`model` with its unquantised parameters in the dtype of `config.upcast`, wrapped in LoRA adapters by peft.

    Raises `UnsupportedModel` where the target modules name nothing in this model.
    """
    from peft import LoraConfig, get_peft_model

    upcast_parameters(model, config)
    targets = list(config.target_modules)
    if targets != ["all-linear"]:
        _check_targets(model, targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise UnsupportedModel(f"LoRA does not apply: {str(error).splitlines()[0][:300]}") from error
    for parameter in trainable(wrapped):
        parameter.data = parameter.data.to(getattr(torch, config.adapter_dtype))
    return wrapped


def _check_targets(model: Any, targets: list[str]) -> None:
    """peft refuses names only where none of them is found, and leaves out the others without a word."""
    names = [name for name, _ in model.named_modules()]
    missing = [one for one in targets if not any(name == one or name.endswith(f".{one}") for name in names)]
    if missing:
        raise UnsupportedModel(f"LoRA does not apply: the model has no module {', '.join(missing)}")


def upcast_parameters(model: Any, config: TrainingConfig) -> None:
    """fp32: as peft.prepare_model_for_kbit_training. norms: the same, then matrices cast back to `compute_dtype`."""
    if config.upcast is Upcast.NONE:
        return
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if config.upcast is Upcast.NORMS:
        for parameter in model.parameters():
            if parameter.dtype == torch.float32 and parameter.ndim >= 2:
                parameter.data = parameter.data.to(getattr(torch, config.compute_dtype))


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_checkpointing(model: Any, config: TrainingConfig) -> None:
    """Turn activation checkpointing on as `config.gradient_checkpointing` says, or off.

    Raises `UnsupportedModel` where the installed transformers has no such mode (partial and offloaded need 5.23).
    """
    mode = config.gradient_checkpointing
    if mode == "off":
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()
        return
    kwargs = {"use_reentrant": config.reentrant}
    every = re.fullmatch(r"every_(\d+)", mode)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=kwargs,
            every_n_layers=int(every.group(1)) if every else 1,
            offload=mode == "offload",
        )
    elif mode == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if config.reentrant or config.trainer is Trainer.TRL:
            model.enable_input_require_grads()
    else:
        raise UnsupportedModel(f"gradient_checkpointing {mode} needs transformers 5.23 or newer")


def set_attention(model: Any, attention: Attention) -> None:
    """Switch a built model to another attention implementation. Raises `UnsupportedModel` where it has none."""
    if model.config._attn_implementation == attention.value:
        return
    try:
        model.set_attn_implementation(attention.value)
    except (ValueError, ImportError) as error:
        raise UnsupportedModel(f"attention {attention.value}: {str(error).splitlines()[0][:300]}") from error
    if model.config._attn_implementation != attention.value:
        raise UnsupportedModel(
            f"attention {attention.value}: this architecture stays {model.config._attn_implementation}"
        )


def make_optimizer(model: Any, config: TrainingConfig, device: torch.device, folder: str) -> torch.optim.Optimizer:
    """The optimizer that transformers' Trainer makes for this name. `folder` is named to it and stays empty.

    Raises `UnsupportedModel` for a name that transformers does not know or whose library is missing.
    """
    from transformers import Trainer as HfTrainer
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(
            output_dir=folder, optim=config.optimizer, use_cpu=device.type != "cuda", report_to="none"
        )
        kind, kwargs = HfTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ValueError, ImportError) as error:
        raise UnsupportedModel(f"optimizer {config.optimizer}: {str(error).splitlines()[0][:300]}") from error
    optimizer: torch.optim.Optimizer = kind(trainable(model), **kwargs)
    return optimizer


def check_loss_path(config: TrainingConfig, device: torch.device) -> None:
    """Raises `UnsupportedModel` for a loss that this device or installation cannot compute."""
    if config.loss is LossPath.LIGER and device.type != "meta":  # a dry run has stand-ins
        if device.type == "cpu":
            raise UnsupportedModel("loss liger needs a GPU: its kernels are written in Triton")
        try:
            import liger_kernel  # noqa: F401
        except ImportError as error:
            raise UnsupportedModel("loss liger needs the package liger-kernel") from error
