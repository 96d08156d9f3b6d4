"""What surrounds a command: its program on PATH, the packages beside it, and the allocator's variables."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from autotune.recover.command.errors import NOT_EXECUTABLE, CommandNotFound
from autotune.recover.command.words import ASSIGNMENT

#: torch 2.9 has the first name and ignores expandable_segments in it; 2.11 does not (pytorch issue 183387).
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def check_program(word: str, *, cwd: Path, environ: Mapping[str, str]) -> Path:
    """Where the program is. Raises CommandNotFound, with the exit code that a shell gives."""
    if (found := find_program(word, cwd=cwd, environ=environ)) is not None:
        return found
    if len(word.split()) > 1 and not (cwd / word).exists():
        raise CommandNotFound(
            f"{word[:60]!r} is one word: give the command as words after --, as in autotune run -- python train.py"
        )
    path = cwd / word
    if os.sep in word and path.exists():
        what = (
            "a folder: name the program in it"
            if path.is_dir()
            else f"not executable: name a program, or put its interpreter in front (python {word})"
        )
        raise CommandNotFound(f"{word} is {what}", exit_code=NOT_EXECUTABLE)
    if ASSIGNMENT.match(word):
        raise CommandNotFound(f"{word[:60]!r} sets a variable, and is no program: put env in front (env {word[:60]} …)")
    if word.startswith("-"):
        raise CommandNotFound(f"{word[:60]!r} is no program: the options of autotune go before --")
    raise CommandNotFound(f"there is no program {word!r}: correct its name, or activate the environment that has it")


def find_program(word: str, *, cwd: Path, environ: Mapping[str, str]) -> Path | None:
    """A program that can be run: on PATH, or where the word says."""
    if os.sep in word:
        path = cwd / word
        return path if path.is_file() and os.access(path, os.X_OK) else None
    found = shutil.which(word, path=environ.get("PATH", os.defpath))
    return Path(found) if found else None


def version_beside(program: Path | None, package: str) -> tuple[int, int] | None:
    """Major and minor version of a package in the environment that a program lies in; None: not known."""
    if program is None:
        return None
    if not program.name.startswith("python"):  # a link to a tool's own environment; an interpreter's stays where it is
        program = program.resolve()
    for folder in program.parent.parent.glob(
        "[Ll]ib*/**/site-packages" if os.name == "nt" else "lib/python3*/site-packages"
    ):
        for found in folder.glob(f"{package}-*.dist-info"):
            if match := re.match(rf"{package}-(\d+)\.(\d+)", found.name):
                return int(match[1]), int(match[2])
    return None


def allocator_variables(value: str, environ: Mapping[str, str], torch: tuple[int, int] | None) -> dict[str, str]:
    """The variables that set the allocator ("expandable_segments" or "default"); what they say beside it stays."""
    new, old = ALLOCATOR_VARIABLES
    names = ALLOCATOR_VARIABLES if torch is None else (new,) if torch >= (2, 11) else (old,)
    before = environ.get(new) or environ.get(old) or ""
    parts = [part for part in before.split(",") if part.strip() and not part.strip().startswith("expandable_segments")]
    if value == "expandable_segments":
        parts.append("expandable_segments:True")
    elif not before:
        return {}
    return dict.fromkeys(names, ",".join(parts))


def assigned(words: Sequence[str], program: int) -> dict[str, str]:
    """What `env NAME=value` in front of the program sets."""
    return dict(word.split("=", 1) for word in words[:program] if ASSIGNMENT.match(word))
