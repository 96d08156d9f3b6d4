"""LLaMA-Factory's keys: TrainingArguments with words of its own for model, data and checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.recover.command import stated
from autotune.recover.command.dialect import Dialect
from autotune.recover.command.stated import Raw

_KEYS = {
    "micro_batch_size": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "eval_micro_batch_size": ("per_device_eval_batch_size",),
    "gradient_checkpointing": ("disable_gradient_checkpointing",),
    "sequence_length": ("cutoff_len",),
    "optimizer": ("optim",),
    "attention": ("flash_attn",),
    "dataloader_workers": ("dataloader_num_workers",),
    "output_dir": ("output_dir",),
    "save_strategy": ("save_strategy",),
    "save_steps": ("save_steps",),
    "resume_from_checkpoint": ("resume_from_checkpoint",),
    "model": ("model_name_or_path",),
    "lora_rank": ("lora_rank",),
    "lora_alpha": ("lora_alpha",),
    "target_modules": ("lora_target",),
    "packing": ("packing",),
    "double_quant": ("double_quantization",),
}
_DEFAULTS: dict[str, Any] = {
    "output_dir": "trainer_output",
    "micro_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "eval_micro_batch_size": 8,
    "gradient_checkpointing": "full",
    "sequence_length": 2048,
    "optimizer": "adamw_torch_fused",
    "save_strategy": "steps",
    "save_steps": 500,
    "dataloader_workers": 0,
    "packing": False,
    "quantization": "none",
}
_MORE = frozenset({"use_unsloth_gc", "bf16", "pure_bf16", "fp16", "quantization_bit", "quantization_type"}) | {
    *("finetuning_type", "overwrite_output_dir", "neat_packing")
}
_ATTENTION = {"sdpa": "sdpa", "fa2": "flash_attention_2", "disabled": "eager"}
_WORDS = {name: word for word, name in _ATTENTION.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaFactory(Dialect):
    """`llamafactory-cli train x.yaml`."""

    def special(self, raw: Raw, values: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"gradient_checkpointing": _mode(raw), "compute_dtype": _dtype(raw)}
        if stated.whole(raw, "quantization_bit", 1) == 4:
            kind = stated.text(raw, "quantization_type") or "nf4"
            found |= {"quantization": kind, "double_quant": values.get("double_quant", True)}
        if (stated.text(raw, "finetuning_type") or "lora") == "lora":
            rank = values.get("lora_rank", 8)
            targets = values.get("target_modules", ("all",))
            found |= {
                "lora_rank": rank,
                "lora_alpha": values.get("lora_alpha", 2 * rank),
                "target_modules": ("all-linear",) if tuple(targets) == ("all",) else tuple(targets),
            }
        if stated.is_on(raw, "neat_packing"):
            found["packing"] = True
        return found

    def settings(self, raw: Raw) -> Any:
        """Its word for attention is another than everybody's; `auto` is left to it."""
        known = {key: value for key, value in raw.items() if key != "flash_attn"}
        if (name := _ATTENTION.get(stated.text(raw, "flash_attn") or "")) is not None:
            known["flash_attn"] = stated.Stated(name, raw["flash_attn"].where)
        return Dialect.settings(self, known)

    def can(self, field: str, value: Any, raw: Raw) -> bool:
        return Dialect.can(self, field, value, raw) and (field != "attention" or value in _WORDS)

    def can_checkpoint(self, mode: str, raw: Raw) -> bool:
        return mode in ("off", "full", "offload")

    def checkpointing(self, mode: str, raw: Raw) -> dict[str, Any]:
        new: dict[str, Any] = {"disable_gradient_checkpointing": mode == "off"}
        if mode == "offload" or (mode == "full" and stated.is_on(raw, "use_unsloth_gc")):
            new["use_unsloth_gc"] = mode == "offload"
        return new

    def edits(self, change: Mapping[str, Any], raw: Raw) -> dict[str, Any]:
        new = Dialect.edits(self, change, raw)
        return new | ({"flash_attn": _WORDS[str(change["attention"])]} if "attention" in change else {})

    def resuming(self, checkpoint: Path | None, raw: Raw) -> dict[str, Any]:
        """Without this it resumes by itself from the newest folder, complete or not."""
        if checkpoint is None:
            return {} if stated.truth(raw, "overwrite_output_dir") else {"overwrite_output_dir": True}
        return Dialect.resuming(self, checkpoint, raw)


LLAMAFACTORY = LlamaFactory(
    name="llamafactory", keys=_KEYS, more_keys=_MORE, defaults=_DEFAULTS, addable=frozenset(_KEYS)
)


def _mode(raw: Raw) -> str:
    if stated.truth(raw, "disable_gradient_checkpointing"):
        return "off"
    return "offload" if stated.truth(raw, "use_unsloth_gc") else "full"


def _dtype(raw: Raw) -> str | None:
    if stated.truth(raw, "bf16") or stated.truth(raw, "pure_bf16"):
        return "bfloat16"
    return "float16" if stated.truth(raw, "fp16") else None
