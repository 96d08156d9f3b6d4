"""One reading of a command's words and config file, and what is changed in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.recover.command.config_file import ConfigFile, write_copy
from autotune.recover.command.dialect import Dialect
from autotune.recover.command.options import Option, Style, rewrite, scan
from autotune.recover.command.stated import Stated
from autotune.recover.command.words import Parts, split


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What stands where. Arguments count more than the file, as every trainer has it."""

    words: tuple[str, ...]
    parts: Parts
    options: Mapping[str, Option]
    file: ConfigFile | None
    style: Style

    @property
    def raw(self) -> dict[str, Stated]:
        stated = dict(self.file.raw) if self.file else {}
        return stated | {key: option.stated for key, option in self.options.items()}

    def edited(self, edits: Mapping[str, Any], folder: Path) -> tuple[list[str], list[str]]:
        """The words with `edits` made in them and in a copy of the file, and a line for each change.

        What is stated nowhere is added to the file, or behind the arguments where there is none.
        """
        file = self.file
        in_file = {key: value for key, value in edits.items() if file and key not in self.options}
        in_words = {key: value for key, value in edits.items() if key not in in_file}
        words, shown = rewrite(self.words, self.parts, self.options, in_words, self.style)
        if file is None or all(key in file.keys and file.keys[key] == value for key, value in in_file.items()):
            return words, shown
        copy, lines = write_copy(file, in_file, folder)
        at = words.index(file.word, self.parts.begin)
        words[at] = f"{file.prefix}{copy}"
        return words, [*shown, *lines]


def read_words(
    words: Sequence[str], environ: Mapping[str, str], dialect: Dialect | None, file: ConfigFile | None, style: Style
) -> Reading:
    parts = split(words, environ)
    options = scan(words, parts, dialect.known, style) if dialect else {}
    return Reading(words=tuple(words), parts=parts, options=options, file=file, style=style)
