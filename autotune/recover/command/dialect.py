"""A trainer's own words for the settings of a run: read into `Settings`, and written back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from autotune.recover.command import stated
from autotune.recover.command.stated import Raw
from autotune.recover.facts import Settings

FIELDS = frozenset(field.name for field in fields(Settings)) - {"trainer"}
#: What only the user sets: who they are is read, never changed.
READ_ONLY = frozenset({"model", "output_dir", "save_strategy", "save_steps", "compute_dtype", "resume_from_checkpoint"})
WRITABLE = FIELDS - READ_ONLY - {"quantization", "lora_rank", "lora_alpha", "target_modules", "packing", "double_quant"}

_READ: dict[str, Callable[[Raw, str], Any]] = {
    "sequence_length": lambda raw, key: stated.whole(raw, key, 1),
    "micro_batch_size": lambda raw, key: stated.whole(raw, key, 1),
    "gradient_accumulation_steps": lambda raw, key: stated.whole(raw, key, 1),
    "eval_micro_batch_size": lambda raw, key: stated.whole(raw, key, 1),
    "dataloader_workers": lambda raw, key: stated.whole(raw, key, 0),
    "lora_rank": lambda raw, key: stated.whole(raw, key, 1),
    "lora_alpha": stated.number,
    "save_steps": stated.number,
    "packing": stated.truth,
    "double_quant": stated.truth,
    "target_modules": stated.names,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect(ABC):
    """One trainer's names. Subclasses say what is more than another name for the same value."""

    name: str
    keys: Mapping[str, tuple[str, ...]]  # field → its names here, the one that is added first
    more_keys: frozenset[str] = frozenset()  # read beside those
    defaults: Mapping[str, Any]  # the trainer's own; empty where it is not known which trainer it is
    addable: frozenset[str]  # fields that may be added where they are not stated
    dashes: bool = False  # options are spelled --with-dashes alone

    @property
    def known(self) -> frozenset[str]:
        """Every option or key that is looked at."""
        return frozenset(key for names in self.keys.values() for key in names) | self.more_keys

    def settings(self, raw: Raw) -> Settings:
        """What the trainer will run with. Raises InvalidRequest for a value that it would not take."""
        values = dict(self.defaults)
        for field, keys in self.keys.items():
            if field == "gradient_checkpointing":
                continue  # special in every trainer
            read = _READ.get(field, stated.text)
            found = [value for key in keys if (value := read(raw, key)) is not None]
            if found:
                values[field] = found[0]
        values |= {name: value for name, value in self.special(raw, values).items() if value is not None}
        return Settings(trainer=self.name, **values)

    @abstractmethod
    def special(self, raw: Raw, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields whose meaning lies in more than one key; `values` are those read so far."""

    def can(self, field: str, value: Any, raw: Raw) -> bool:
        """Whether the trainer can be told to run with this value."""
        if field not in WRITABLE or field not in self.keys:
            return False
        if field == "gradient_checkpointing":
            return self.can_checkpoint(str(value), raw)
        return field in self.addable or self.key(field, raw) in raw

    @abstractmethod
    def can_checkpoint(self, mode: str, raw: Raw) -> bool:
        """Whether the trainer can be told this mode."""

    def edits(self, change: Mapping[str, Any], raw: Raw) -> dict[str, Any]:
        """The trainer's keys with their new values. Every field of `change` must be one that it `can`."""
        new: dict[str, Any] = {}
        for field, value in change.items():
            if field == "gradient_checkpointing":
                new |= self.checkpointing(str(value), raw)
            else:
                new[self.key(field, raw)] = value
        return new

    @abstractmethod
    def checkpointing(self, mode: str, raw: Raw) -> dict[str, Any]:
        """The keys that switch checkpointing to `mode` (off, full, offload, every_N)."""

    def resuming(self, checkpoint: Path | None, raw: Raw) -> dict[str, Any]:
        """The keys that make it resume from `checkpoint`; None: from the start, whatever lies in its output folder."""
        return {} if checkpoint is None else {self.key("resume_from_checkpoint", raw): str(checkpoint)}

    def can_resume(self, raw: Raw) -> bool:
        return "resume_from_checkpoint" in self.addable or self.key("resume_from_checkpoint", raw) in raw

    def key(self, field: str, raw: Raw) -> str:
        """The name for a field that is stated, else the one to add."""
        names = self.keys[field]
        return next((name for name in names if name in raw), names[0])
