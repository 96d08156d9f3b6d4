"""A training command that was understood: what it will run with, what it can be told, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.recover.command.config_file import ConfigFile
from autotune.recover.command.dialect import FIELDS, READ_ONLY, Dialect
from autotune.recover.command.environment import ALLOCATOR_VARIABLES, allocator_variables, assigned
from autotune.recover.command.options import Style
from autotune.recover.command.placeholders import RESUME, fill
from autotune.recover.command.reading import Reading, read_words
from autotune.recover.facts import Change, Launch, Settings

#: What the hook inside the trainer can set in any Trainer of transformers.
HOOK = frozenset({"micro_batch_size", "gradient_accumulation_steps", "eval_micro_batch_size"}) | {
    *("gradient_checkpointing", "dataloader_workers")
}
ALLOCATOR = "allocator"
_ALLOCATORS = ("default", "expandable_segments")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCommand:
    """One training command. `read_command` makes it."""

    argv: tuple[str, ...]  # as given
    carriers: tuple[str, ...]  # of its config: arguments, file, placeholders, environment, hook
    settings: Settings  # as its trainer will run it
    world_size: int | None  # processes, where the command says
    environ: Mapping[str, str]
    dialect: Dialect | None
    style: Style
    file: ConfigFile | None
    placeholders: frozenset[str]
    start: Mapping[str, Any]  # what placeholders are filled with, where nothing else is asked
    torch: tuple[int, int] | None  # version in its environment

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that it can be told, to some value at least, and "allocator"."""
        some = {"gradient_checkpointing": "full", "attention": "sdpa"}
        return frozenset(name for name in {*FIELDS, ALLOCATOR} if self.can(name, some.get(name, _ALLOCATORS[0])))

    @property
    def can_resume(self) -> bool:
        """Whether it can be told to resume from a checkpoint."""
        return self._resumes_by_words or self._by_plan("micro_batch_size", 1)

    def can(self, name: str, value: Any) -> bool:
        """Whether it can be told to run with this value of a setting, or of "allocator"."""
        if name == ALLOCATOR:
            return value in _ALLOCATORS
        return name not in READ_ONLY and (
            name in self.placeholders or self._by_words(name, value) or self._by_plan(name, value)
        )

    def launch(self, change: Change, *, resume: Path | None, folder: Path, fresh: bool = False) -> Launch:
        """One attempt with `change`, resumed from `resume`; copies of config files go to `folder`.

        None to resume from: as the command itself has it; with `fresh`, from the start whatever its output folder
        holds. Raises InvalidRequest for a change that it cannot be told.
        """
        for name, value in change.items():
            if not self.can(name, value):
                raise InvalidRequest(f"this command cannot be told {name} {value}: {ways(self.carriers)}")
        if resume and not self.can_resume:
            raise InvalidRequest(f"this command cannot be told to resume from {resume}: {ways(self.carriers)}")
        reading = self._reading(change, resume)
        edits = self._edits(change, resume, fresh, reading)
        words, shown = reading.edited(edits, folder)
        environ, words = self._allocator(change, words, reading)
        lines = [
            *self._filled(change),
            *shown,
            *self._by_plan_lines(change, resume),
            *(f"{name}={value}" for name, value in environ.items()),
        ]
        return Launch(argv=tuple(words), environ=environ, shown=tuple(lines))

    def _reading(self, change: Change, resume: Path | None) -> Reading:
        values = {**self.start, **change, RESUME: str(resume) if resume else None}
        return read_words(fill(self.argv, values), self.environ, self.dialect, self.file, self.style)

    def _raw(self) -> Mapping[str, Any]:
        return self._reading({}, None).raw

    def _edits(self, change: Change, resume: Path | None, fresh: bool, reading: Reading) -> dict[str, Any]:
        if self.dialect is None:
            return {}
        direct = {name: value for name, value in change.items() if self._direct(name, value)}
        edits = self.dialect.edits(direct, reading.raw)
        if RESUME not in self.placeholders and (resume or fresh) and self.dialect.can_resume(reading.raw):
            edits |= self.dialect.resuming(resume, reading.raw)
        return edits

    def _direct(self, name: str, value: Any) -> bool:
        return name not in self.placeholders and name != ALLOCATOR and self._by_words(name, value)

    def _by_words(self, name: str, value: Any) -> bool:
        return self.dialect is not None and self.dialect.can(name, value, self._raw())

    def _by_plan(self, name: str, value: Any) -> bool:
        if "environment" in self.carriers and name in FIELDS - READ_ONLY:
            return True
        simple = name != "gradient_checkpointing" or value in ("off", "full")
        return "hook" in self.carriers and name in HOOK and simple

    def _allocator(self, change: Change, words: list[str], reading: Reading) -> tuple[dict[str, str], list[str]]:
        if ALLOCATOR not in change:
            return {}, words
        before = assigned(words, reading.parts.program)
        new = allocator_variables(change[ALLOCATOR], {**self.environ, **before}, self.torch)
        for at, word in enumerate(words[: reading.parts.program]):  # what `env` sets counts more than ours
            name = word.partition("=")[0]
            if name in new and name in ALLOCATOR_VARIABLES and "=" in word:
                words[at] = f"{name}={new[name]}"
        return new, words

    def _filled(self, change: Change) -> list[str]:
        names = [name for name in change if name in self.placeholders and change[name] != self.start.get(name)]
        return [f"{{{name}}}: {self.start.get(name)} → {change[name]}" for name in names]

    def _by_plan_lines(self, change: Change, resume: Path | None) -> list[str]:
        """What only the plan carries: the script reads it, or the hook inside the trainer does."""
        known = asdict(self.settings)
        lines = [
            f"{name}: {value if known.get(name) is None else f'{known[name]} → {value}'} (in {self._reader})"
            for name, value in change.items()
            if name != ALLOCATOR and name not in self.placeholders and not self._direct(name, value)
        ]
        if resume and not self._resumes_by_words:
            lines.append(f"resume from {resume} (in {self._reader})")
        return lines

    @property
    def _resumes_by_words(self) -> bool:
        return RESUME in self.placeholders or (self.dialect is not None and self.dialect.can_resume(self._raw()))

    @property
    def _reader(self) -> str:
        return "the script" if "environment" in self.carriers else "the trainer"


def ways(carriers: tuple[str, ...] = ()) -> str:
    """The ways in which a command can be told its config."""
    more = "" if carriers else "nothing in it can be read or changed: "
    return (
        f"{more}give a Hugging Face argument such as --per_device_train_batch_size, name a YAML or JSON config file of"
        " trl, axolotl or LLaMA-Factory, write a placeholder such as {micro_batch_size}, or let the script read"
        " AUTOTUNE_PLAN or call autotune.recover.apply"
    )
