"""axolotl's keys, as of 0.13 and its main branch; its options have the same names, with dashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.recover.command import stated
from autotune.recover.command.dialect import Dialect
from autotune.recover.command.stated import Raw

_KEYS = {
    "micro_batch_size": ("micro_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "eval_micro_batch_size": ("eval_batch_size",),
    "gradient_checkpointing": ("gradient_checkpointing",),
    "sequence_length": ("sequence_len",),
    "optimizer": ("optimizer",),
    "attention": ("attn_implementation",),
    "dataloader_workers": ("dataloader_num_workers",),
    "output_dir": ("output_dir",),
    "save_strategy": ("save_strategy",),
    "save_steps": ("save_steps",),
    "resume_from_checkpoint": ("resume_from_checkpoint",),
    "model": ("base_model",),
    "lora_rank": ("lora_r",),
    "lora_alpha": ("lora_alpha",),
    "target_modules": ("lora_target_modules",),
    "packing": ("sample_packing",),
}
_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "off",
    "sequence_length": 512,
    "output_dir": "./model-out",
    "packing": False,
    "quantization": "none",
}
_OLD_ATTENTION = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
_MORE = frozenset(
    {"batch_size", "activation_offloading", "auto_resume_from_checkpoints", "saves_per_epoch", "bf16"}
) | {*("fp16", "load_in_4bit", "load_in_8bit", "lora_target_linear", "bnb_config_kwargs", *_OLD_ATTENTION)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Axolotl(Dialect):
    """`axolotl train x.yaml`."""

    def special(self, raw: Raw, values: Mapping[str, Any]) -> dict[str, Any]:
        micro = values["micro_batch_size"]
        found: dict[str, Any] = {
            "eval_micro_batch_size": values.get("eval_micro_batch_size", micro),
            "gradient_checkpointing": _mode(raw),
            "compute_dtype": _dtype(raw),
            **_saving(raw),
        }
        total = stated.whole(raw, "batch_size", 1)
        if total is not None and stated.plain(raw, "gradient_accumulation_steps") is None:
            found["gradient_accumulation_steps"] = max(1, total // micro)
        if stated.truth(raw, "load_in_4bit"):
            kwargs = stated.plain(raw, "bnb_config_kwargs") or {}
            found |= {
                "quantization": str(kwargs.get("bnb_4bit_quant_type", "nf4")),
                "double_quant": bool(kwargs.get("bnb_4bit_use_double_quant", True)),
            }
        if stated.is_on(raw, "lora_target_linear"):
            found["target_modules"] = ("all-linear",)
        old = [name for key, name in _OLD_ATTENTION.items() if stated.is_on(raw, key)]
        if old and "attention" not in values:
            found["attention"] = old[0]
        return found

    def can_checkpoint(self, mode: str, raw: Raw) -> bool:
        return mode in ("off", "full", "offload")

    def checkpointing(self, mode: str, raw: Raw) -> dict[str, Any]:
        """Offloading has a key of its own since 0.9; the old word for it still counts, and is kept where it stands."""
        flag: Any = mode != "off"
        if mode == "offload" and str(stated.plain(raw, "gradient_checkpointing")).startswith("offload"):
            return {}
        new = {"gradient_checkpointing": flag}
        if mode == "offload" or stated.is_on(raw, "activation_offloading"):
            new["activation_offloading"] = mode == "offload"
        return new

    def edits(self, change: Mapping[str, Any], raw: Raw) -> dict[str, Any]:
        """A file that states the batch of one step (`batch_size`) may not state the accumulation, too."""
        total = stated.whole(raw, "batch_size", 1)
        new = Dialect.edits(self, change, raw)
        if total is None or "gradient_accumulation_steps" in raw or "gradient_accumulation_steps" not in new:
            return new
        micro = change.get("micro_batch_size") or stated.whole(raw, "micro_batch_size", 1) or 1
        batch = micro * new.pop("gradient_accumulation_steps")
        return new if batch == total else new | {"batch_size": batch}

    def resuming(self, checkpoint: Path | None, raw: Raw) -> dict[str, Any]:
        if checkpoint is None:
            return {"auto_resume_from_checkpoints": False} if stated.is_on(raw, "auto_resume_from_checkpoints") else {}
        return Dialect.resuming(self, checkpoint, raw)


AXOLOTL = Axolotl(
    name="axolotl",
    keys=_KEYS,
    more_keys=_MORE,
    defaults=_DEFAULTS,
    addable=frozenset(_KEYS) - {"attention"},
    dashes=True,
)


def _mode(raw: Raw) -> str | None:
    if not stated.is_on(raw, "gradient_checkpointing"):
        return None
    word = str(stated.plain(raw, "gradient_checkpointing")).lower()
    return "offload" if word.startswith("offload") or stated.is_on(raw, "activation_offloading") else "full"


def _dtype(raw: Raw) -> str | None:
    if stated.is_on(raw, "fp16"):
        return "float16"
    return "bfloat16" if stated.plain(raw, "bf16") is None or stated.is_on(raw, "bf16") else "float32"


def _saving(raw: Raw) -> dict[str, Any]:
    if stated.number(raw, "save_steps") or stated.number(raw, "saves_per_epoch"):
        return {"save_strategy": "steps"}
    return {"save_strategy": stated.text(raw, "save_strategy") or "epoch"}
