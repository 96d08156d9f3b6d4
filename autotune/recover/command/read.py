"""Words of a shell → `TrainingCommand`: whose program it is, what it states, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.recover.command.axolotl import AXOLOTL
from autotune.recover.command.command import TrainingCommand, ways
from autotune.recover.command.config_file import SUFFIXES, ConfigFile, read_file
from autotune.recover.command.dialect import Dialect
from autotune.recover.command.environment import check_program, find_program, version_beside
from autotune.recover.command.huggingface import ARGUMENTS, TELLING, transformers_dialect, trl_dialect
from autotune.recover.command.llamafactory import LLAMAFACTORY
from autotune.recover.command.options import Style, scan
from autotune.recover.command.placeholders import fill, names_in
from autotune.recover.command.reading import Reading, read_words
from autotune.recover.command.script import Script, read_script
from autotune.recover.command.words import Parts, is_isolated, options_before, split
from autotune.recover.facts import Settings

#: Keys of which a trainer's config file has one; a DeepSpeed file, say, has none.
_TELLING_KEYS = TELLING - {"gradient_accumulation_steps"} | {"output_dir"}
_OTHER_FILES = ("--deepspeed", "--fsdp_config", "--accelerate_config", "--config_file", "--dataset", "--data")


def read_command(
    argv: Sequence[str], *, cwd: Path, environ: Mapping[str, str], hooked: bool, start: Settings | None = None
) -> TrainingCommand:
    """What a training command says. `start`: values of its placeholders; `hooked`: the hook will be in its trainer.

    Raises InvalidRequest for one that cannot be read or changed, and CommandNotFound where there is no such program.
    """
    if not argv or not argv[0].strip():
        raise InvalidRequest("there is no command: give it behind --, as in autotune run -- python train.py")
    check_program(argv[0], cwd=cwd, environ=environ)
    placeholders = names_in(argv)
    begin = {name: value for name, value in asdict(start or Settings()).items() if value is not None}
    words = fill(argv, begin | {"resume_from_checkpoint": None})
    parts = split(words, environ)
    script = read_script(_script_path(parts, cwd))
    program = find_program(words[parts.program], cwd=cwd, environ=environ)
    file = _config_file(words, parts, script, cwd)
    dialect = _dialect(words, parts, script, file, version_beside(program, "transformers"))
    style = _style(words, parts, script, file, dialect)
    reading = read_words(words, environ, dialect, file, style)
    settings = dialect.settings(reading.raw) if dialect else Settings()
    isolated = is_isolated(words, parts)
    carriers = _carriers(reading, dialect, placeholders, script, hooked and not isolated)
    if not carriers:
        name = parts.script or parts.module or words[parts.program]
        why = " (its interpreter's -I, -E or -S leaves the hook out)" if hooked and isolated else ""
        raise InvalidRequest(f"{name[:80]}{why}: {ways()}")
    return TrainingCommand(
        argv=tuple(argv),
        carriers=carriers,
        settings=_with_start(settings, begin, placeholders, script),
        world_size=parts.world_size or _world_size(words, parts, file, cwd),
        environ=dict(environ),
        dialect=dialect,
        style=style,
        file=file,
        placeholders=placeholders,
        start=begin,
        torch=version_beside(program, "torch"),
    )


def _script_path(parts: Parts, cwd: Path) -> Path | None:
    if parts.script is not None:
        return cwd / parts.script
    if parts.module is None:
        return None
    beside = cwd / parts.module.replace(".", "/")
    return beside / "__main__.py" if beside.is_dir() else beside.with_suffix(".py")


def _carriers(
    reading: Reading, dialect: Dialect | None, placeholders: frozenset[str], script: Script, hooked: bool
) -> tuple[str, ...]:
    found = {
        "arguments": dialect is not None and (reading.file is None or bool(reading.options)),
        "file": reading.file is not None,
        "placeholders": bool(placeholders),
        "environment": script.reads_plan,
        "hook": hooked,
    }
    return tuple(name for name, there in found.items() if there)


def _with_start(settings: Settings, begin: Mapping[str, Any], names: frozenset[str], script: Script) -> Settings:
    """Placeholders run with what they are filled with; a script that reads the plan, with what the plan begins with."""
    known = asdict(settings)
    filled = {
        name: value for name, value in begin.items() if name in names or (script.reads_plan and known[name] is None)
    }
    return replace(settings, **filled)


def _world_size(words: Sequence[str], parts: Parts, file: ConfigFile | None, cwd: Path) -> int | None:
    """Processes, where a config file of accelerate or trl says. One that cannot be read is for accelerate to tell."""
    keys: Mapping[str, Any] = file.keys if file is not None and parts.trainer == "trl" else {}
    if name := options_before(words, parts.program, parts.begin).get("config_file"):
        try:
            keys = read_file(name, cwd).keys
        except InvalidRequest:
            return None
    count = keys.get("num_processes")
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else None


# The config file


def _config_file(words: Sequence[str], parts: Parts, script: Script, cwd: Path) -> ConfigFile | None:
    """Raises InvalidRequest where a trainer's own program names a file that it could not read."""
    arguments = words[parts.begin : parts.end]
    if parts.trainer == "trl" or script.hugging_face:
        if (word := _named(arguments, "--config")) is not None:
            return read_file(word, cwd)
        if parts.trainer is None and len(arguments) == 1 and arguments[0].endswith(SUFFIXES):
            return read_file(arguments[0], cwd)
    if parts.trainer == "axolotl":
        first = next((word for word in arguments if not word.startswith("-")), None)
        return read_file(first, cwd) if first is not None else None
    if parts.trainer == "llamafactory":
        return read_file(arguments[0], cwd) if arguments and arguments[0].endswith(SUFFIXES) else None
    return None if parts.trainer or parts.shell else _likely_file(arguments, cwd)


def _named(arguments: Sequence[str], option: str) -> str | None:
    """The word that holds an option's value."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == option and following:
            return following
        if word.startswith(f"{option}="):
            return word
    return None


def _likely_file(arguments: Sequence[str], cwd: Path) -> ConfigFile | None:
    """A file that holds keys of TrainingArguments."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        option = word.partition("=")[0] if "=" in word else before
        if not word.endswith(SUFFIXES) or option in _OTHER_FILES:
            continue
        try:
            file = read_file(word, cwd)
        except InvalidRequest:
            continue  # another program's file: it may be anything
        if _TELLING_KEYS & {str(key) for key in file.keys}:
            return file
    return None


# The dialect


def _dialect(
    words: Sequence[str], parts: Parts, script: Script, file: ConfigFile | None, version: tuple[int, int] | None
) -> Dialect | None:
    if parts.trainer == "trl":
        return trl_dialect(version=version, program=parts.subprogram)
    if parts.trainer:
        return AXOLOTL if parts.trainer == "axolotl" else LLAMAFACTORY
    if not (file or script.hugging_face or scan(words, parts, TELLING, Style())):
        return None
    known = not script.own_parser and not parts.shell
    return transformers_dialect(version=version, trl=script.trl, addable=_addable(parts, script, file), known=known)


def _addable(parts: Parts, script: Script, file: ConfigFile | None) -> frozenset[str]:
    if parts.shell:
        return frozenset()
    if file or not script.own_parser:
        unused = {"resume_from_checkpoint"} if script.ignores("resume_from_checkpoint") else set()
        return frozenset(ARGUMENTS) - unused
    named = frozenset(field for field, keys in ARGUMENTS.items() if script.names(keys))
    return named if script.bare_checkpointing else named - {"gradient_checkpointing"}


def _style(
    words: Sequence[str], parts: Parts, script: Script, file: ConfigFile | None, dialect: Dialect | None
) -> Style:
    if parts.trainer == "llamafactory":
        return Style(assignments=file is not None, lower=True)
    if parts.trainer == "axolotl" or dialect is None:
        return Style(dashes=True, lower=True)
    names = [option.name.lstrip("-") for option in scan(words, parts, dialect.known, Style()).values()]
    dashes = any("-" in name for name in names) and not any("_" in name for name in names)
    return Style(dashes=dashes, bare=script.bare_checkpointing)
