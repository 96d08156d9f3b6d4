"""A plan's settings put into a Trainer's arguments, and compared with what is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Settings whose place in `TrainingArguments` holds the same value.
_PLAIN = {
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "eval_micro_batch_size": "per_device_eval_batch_size",
    "dataloader_workers": "dataloader_num_workers",
}


def apply_to_arguments(arguments: Any, changed: Mapping[str, Any]) -> tuple[str, ...]:
    """Set what a plan changed; gives the settings that have no place here (they came another way, or not at all)."""
    left = []
    for name, value in changed.items():
        if name in _PLAIN:
            setattr(arguments, _PLAIN[name], value)
            if name == "dataloader_workers" and not value:
                _without_workers(arguments)
        elif name != "gradient_checkpointing" or not set_checkpointing(arguments, value):
            left.append(name)
    return tuple(left)


def apply_to_trainer(trainer: Any, changed: Mapping[str, Any]) -> tuple[str, ...]:
    """`apply_to_arguments`, and what a Trainer has copied from its arguments when it was made."""
    arguments = trainer.args
    steps = arguments.gradient_accumulation_steps
    if getattr(trainer, "is_deepspeed_enabled", False):
        # Its engine was configured from the arguments already: only what it does not know may still change.
        fixed = {
            key for key in ("micro_batch_size", "gradient_accumulation_steps") if _differs(arguments, key, changed)
        }
        return (*apply_to_arguments(arguments, {k: v for k, v in changed.items() if k not in fixed}), *sorted(fixed))
    left = apply_to_arguments(arguments, changed)
    if "micro_batch_size" in changed:
        trainer._train_batch_size = arguments.train_batch_size
    accelerator = getattr(trainer, "accelerator", None)
    # The Trainer divides by the steps itself and leaves accelerate at 1; a value there is one that it was given.
    if accelerator is not None and accelerator.gradient_accumulation_steps == steps > 1:
        accelerator.gradient_accumulation_steps = arguments.gradient_accumulation_steps
    if "gradient_checkpointing" in changed and not is_checkpointing(arguments):
        _disable_checkpointing(trainer.model)
    return left


def differences(trainer: Any, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings of the plan that the trainer does not run with: name → [planned, actual]."""
    found = {}
    for name, place in _PLAIN.items():
        actual = getattr(trainer.args, place, None)
        if config.get(name) is not None and config[name] != actual:
            found[name] = [config[name], actual]
    planned = config.get("gradient_checkpointing")
    if planned is not None and _is_on(planned) != is_checkpointing(trainer.args):
        found["gradient_checkpointing"] = [planned, is_checkpointing(trainer.args)]
    return found


def is_checkpointing(arguments: Any) -> bool:
    """Whether activations are recomputed; the name changed in transformers 5.23."""
    return bool(
        getattr(arguments, "activation_checkpointing", None) or getattr(arguments, "gradient_checkpointing", None)
    )


def set_checkpointing(arguments: Any, mode: Any) -> bool:
    """Set a mode ("off", "full", "offload", "every_N", or a bool); False where this transformers has no such mode."""
    is_new = hasattr(arguments, "activation_checkpointing")
    every = re.fullmatch(r"every_(\d+)", str(mode))
    if not is_new and (every or mode == "offload"):
        return False
    is_on = _is_on(mode)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(arguments, name):
            setattr(arguments, name, is_on)
    if is_on:
        name = "activation_checkpointing_kwargs" if is_new else "gradient_checkpointing_kwargs"
        given = dict(getattr(arguments, name, None) or {})
        given.setdefault("use_reentrant", False)
        for key in ("every_n_layers", "offload"):
            given.pop(key, None)
        if every:
            given["every_n_layers"] = int(every[1])
        if mode == "offload":
            given["offload"] = True
        setattr(arguments, name, given)
    return True


def _is_on(mode: Any) -> bool:
    return mode not in (False, None, "off", "none", "false")


def _differs(arguments: Any, name: str, changed: Mapping[str, Any]) -> bool:
    return name in changed and getattr(arguments, _PLAIN[name]) != changed[name]


def _without_workers(arguments: Any) -> None:
    """A loader without workers refuses what only workers can do."""
    arguments.dataloader_persistent_workers = False
    arguments.dataloader_prefetch_factor = None


def _disable_checkpointing(model: Any) -> None:
    """The model may have been told already, by the script or by a subclass's constructor."""
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
        if hasattr(model, name):
            getattr(model, name)()
            return
