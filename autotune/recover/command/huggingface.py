"""TrainingArguments of transformers, and what trl's configs add to them.

Defaults as in transformers 4.57 to 5.23 and trl 0.20 to 1.16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import InvalidRequest
from autotune.recover.command import stated
from autotune.recover.command.dialect import Dialect
from autotune.recover.command.stated import Raw

ARGUMENTS = {
    "micro_batch_size": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "eval_micro_batch_size": ("per_device_eval_batch_size",),
    "gradient_checkpointing": ("gradient_checkpointing", "activation_checkpointing"),
    "optimizer": ("optim",),
    "dataloader_workers": ("dataloader_num_workers",),
    "output_dir": ("output_dir",),
    "save_strategy": ("save_strategy",),
    "save_steps": ("save_steps",),
    "resume_from_checkpoint": ("resume_from_checkpoint",),
}
#: Names that scripts and trl's ModelConfig and SFTConfig have for the rest.
_USUAL = {
    "model": ("model_name_or_path", "model_name", "model_id", "model"),
    "sequence_length": ("max_length", "max_seq_length", "max_seq_len", "model_max_length", "block_size"),
    "attention": ("attn_implementation",),
    "lora_rank": ("lora_r", "lora_rank"),
    "lora_alpha": ("lora_alpha",),
    "target_modules": ("lora_target_modules",),
    "packing": ("packing",),
    "double_quant": ("use_bnb_nested_quant", "bnb_4bit_use_double_quant"),
}
_FLAGS = ("activation_checkpointing", "gradient_checkpointing")  # the first is the one that counts where both are set
_PARTIAL = ("offload", "every_n_layers")  # keys of the checkpointing arguments, from transformers 5.23
_MORE = frozenset(
    {
        *(f"{flag}_kwargs" for flag in _FLAGS),
        *("bf16", "fp16", "dtype", "torch_dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
        *("use_peft", "activation_offloading"),
    }
)
_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output",
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "eval_micro_batch_size": 8,
    "gradient_checkpointing": "off",
    "optimizer": "adamw_torch_fused",
    "save_strategy": "steps",
    "save_steps": 500,
    "dataloader_workers": 0,
}
_TRL_DEFAULTS = _DEFAULTS | {"gradient_checkpointing": "full", "compute_dtype": "bfloat16"}
#: What trl's own programs add: their ModelConfig.
_TRL_CLI = {"double_quant": False, "packing": False}
_WITH_LENGTH = ("sft", "dpo", "kto", "reward")  # configs with max_length, 1024
#: Options that only a program of this family has: one of them tells that the rest is understood, too.
TELLING = frozenset(
    {
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("gradient_checkpointing", "activation_checkpointing", "num_train_epochs", "save_strategy"),
        *("dataloader_num_workers", "lr_scheduler_type", "eval_strategy", "logging_strategy"),
    }
)
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace(Dialect):
    """Whatever parses its arguments into TrainingArguments, or looks as if it did."""

    partial: bool  # whether checkpointing of every n-th layer and offloading are known to exist
    new_name: bool = False  # add activation_checkpointing, not gradient_checkpointing

    def special(self, raw: Raw, values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "gradient_checkpointing": self._mode(raw),
            "compute_dtype": _dtype(raw),
            "quantization": _quantization(raw),
        }
        if stated.truth(raw, "use_peft"):
            found |= {"lora_rank": values.get("lora_rank", 16), "lora_alpha": values.get("lora_alpha", 32)}
        if (targets := values.get("target_modules")) and len(targets) == 1:
            found["target_modules"] = tuple(targets)
        return found

    def can_checkpoint(self, mode: str, raw: Raw) -> bool:
        if "gradient_checkpointing" not in self.addable and not any(flag in raw for flag in _FLAGS):
            return False
        return mode in ("off", "full") or self.partial or any(name in self._kwargs(raw) for name in _PARTIAL)

    def checkpointing(self, mode: str, raw: Raw) -> dict[str, Any]:
        flag = self._flag(raw)
        new: dict[str, Any] = {flag: mode != "off"}
        if stated.is_on(raw, "activation_offloading") and mode != "offload":
            new["activation_offloading"] = False
        kwargs = self._kwargs(raw)
        wanted = {name: value for name, value in kwargs.items() if name not in _PARTIAL}
        if mode == "offload":
            wanted["offload"] = True
        elif mode.startswith("every_"):
            wanted["every_n_layers"] = int(mode.removeprefix("every_"))
        if mode != "off" and wanted != kwargs:
            new[self._kwargs_key(raw) or f"{flag}_kwargs"] = wanted
        return new

    def _mode(self, raw: Raw) -> str | None:
        on = stated.truth(raw, self._flag(raw))
        if on is None and self.defaults.get("gradient_checkpointing") != "full":
            return None
        if on is False:
            return "off"
        kwargs = self._kwargs(raw)
        if kwargs.get("offload") is True or stated.is_on(raw, "activation_offloading"):
            return "offload"
        every = kwargs.get("every_n_layers", 1)
        return f"every_{every}" if isinstance(every, int) and every > 1 else "full"

    def _flag(self, raw: Raw) -> str:
        given = [flag for flag in _FLAGS if stated.plain(raw, flag) is not None]
        return given[0] if given else _FLAGS[0 if self.new_name else 1]

    def _kwargs_key(self, raw: Raw) -> str | None:
        return next((f"{flag}_kwargs" for flag in _FLAGS if stated.plain(raw, f"{flag}_kwargs") is not None), None)

    def _kwargs(self, raw: Raw) -> dict[str, Any]:
        key = self._kwargs_key(raw)
        value = stated.plain(raw, key) if key else {}
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            value = None
        if key and not isinstance(value, dict):
            raise InvalidRequest(
                f"{raw[key].where} holds no JSON object: write it as {{'use_reentrant': false}} in JSON"
            )
        return dict(value or {})


def transformers_dialect(
    *, version: tuple[int, int] | None, trl: bool, addable: frozenset[str], known: bool
) -> HuggingFace:
    """A script's. `addable`: what may be added to its arguments; `known`: they are surely TrainingArguments."""
    new = version is not None and version >= (5, 23)
    defaults = _TRL_DEFAULTS if trl else _DEFAULTS
    return HuggingFace(
        name="trl" if trl else "transformers",
        keys=ARGUMENTS | _USUAL,
        more_keys=_MORE,
        defaults=defaults if known else {},
        addable=addable,
        partial=new,
        new_name=new and not trl and known,
    )


def trl_dialect(*, version: tuple[int, int] | None, program: str) -> HuggingFace:
    """That of `trl sft` and its like."""
    length = program in _WITH_LENGTH
    return HuggingFace(
        name="trl",
        keys=ARGUMENTS | _USUAL,
        more_keys=_MORE,
        defaults=_TRL_DEFAULTS | _TRL_CLI | {"quantization": "none"} | ({"sequence_length": 1024} if length else {}),
        addable=frozenset(ARGUMENTS) | {"attention"} | ({"sequence_length"} if length else set()),
        partial=version is not None and version >= (5, 23),
    )


def _dtype(raw: Raw) -> str | None:
    if stated.truth(raw, "bf16"):
        return "bfloat16"
    if stated.truth(raw, "fp16"):
        return "float16"
    name = stated.text(raw, "dtype") or stated.text(raw, "torch_dtype")
    if name is None:
        return "float32" if stated.truth(raw, "bf16") is False else None
    return _DTYPES.get(name, name.removeprefix("torch."))


def _quantization(raw: Raw) -> str | None:
    if stated.truth(raw, "load_in_4bit"):
        return stated.text(raw, "bnb_4bit_quant_type") or "nf4"
    return "none" if stated.truth(raw, "load_in_4bit") is False else None
