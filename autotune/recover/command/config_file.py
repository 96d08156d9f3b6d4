"""A trainer's YAML or JSON config: read, and copied with single keys changed; comments, order and quoting stay."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.configfile import text_of
from autotune.errors import InvalidRequest
from autotune.recover.command.stated import Stated

SUFFIXES = (".yaml", ".yml", ".json")
_MAX_BYTES = 1 << 20
_WIDTH = 1 << 20  # no line is ever folded
#: A list that stands further right than its key.
_INDENTED_LIST = re.compile(r"^[^\s#-][^\n]*:[^\S\n]*(#[^\n]*)?\n(\s*(#[^\n]*)?\n)*[^\S\n]+- ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """A config file that a command names."""

    word: str  # that names it: the path, or --config=path
    prefix: str  # of that word, before the path
    path: Path
    keys: Mapping[str, Any]
    text: str

    @property
    def raw(self) -> dict[str, Stated]:
        return {str(key): Stated(value, f"{self.path.name}: {key}") for key, value in self.keys.items()}


def read_file(word: str, cwd: Path) -> ConfigFile:
    """The file that a word of the command names.

    Raises InvalidRequest: not there, no text, neither YAML nor JSON, a key twice, no mapping.
    """
    prefix = "" if "=" not in word or (cwd / word).exists() else word[: word.index("=") + 1]
    path = cwd / word.removeprefix(prefix)
    text = text_of(path, most_bytes=_MAX_BYTES, advice="name a YAML or JSON file in the command")
    keys = _of_json(text, path) if path.suffix.lower() == ".json" else _of_yaml(text, path)
    return ConfigFile(word=word, prefix=prefix, path=path, keys=keys, text=text)


def write_copy(file: ConfigFile, edits: Mapping[str, Any], folder: Path) -> tuple[Path, list[str]]:
    """A copy in `folder` with these keys changed, readable by its owner only, and a line for each key.

    The name keeps its ending and begins with `config-`, so that nothing else in the folder is met.
    """
    is_json = file.path.suffix.lower() == ".json"
    text = _edit_json(file, edits) if is_json else _edit_yaml(file, edits)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy = folder / f"config-{file.path.name}"
    descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8", newline="") as stream:
        stream.write(text)
    return copy, [line for key, value in edits.items() if (line := _line(file, key, value))]


def _line(file: ConfigFile, key: str, value: Any) -> str:
    new = _shown(value)
    if key not in file.keys:
        return f"{file.path.name}: {key}: {new} (added)"
    return "" if file.keys[key] == value else f"{file.path.name}: {key}: {_shown(file.keys[key])} → {new}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _of_json(text: str, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise _twice(path, twice)
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(f"{path} is no JSON{line}: mend it") from error
    return _mapping(data, path)


def _of_yaml(text: str, path: Path) -> dict[str, Any]:
    """Values as PyYAML has them: it is what the trainers read with."""
    import yaml
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        _round_trip().load(text)
        data = yaml.safe_load(text)
    except DuplicateKeyError as error:
        found = re.search(r'found duplicate key "([^"]*)"', str(error.problem))
        raise _twice(path, found[1] if found else "a key") from error
    except (yaml.YAMLError, YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise InvalidRequest(f"{path} is no YAML{line}: mend it") from error
    return _mapping(data, path)


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path} holds no keys: write lines such as gradient_accumulation_steps: 4")
    return data


def _twice(path: Path, key: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {key} is there twice: keep one of them")


def _edit_json(file: ConfigFile, edits: Mapping[str, Any]) -> str:
    indent = re.search(r"\n([ \t]+)\"", file.text)
    end = "\n" if file.text.endswith("\n") else ""
    return json.dumps({**file.keys, **edits}, indent=indent[1] if indent else None, ensure_ascii=False) + end


def _edit_yaml(file: ConfigFile, edits: Mapping[str, Any]) -> str:
    yaml = _round_trip(file.text)
    data = yaml.load(file.text)
    for key, value in edits.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _update(data[key], value)
        else:
            data[key] = value
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _update(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Change a mapping in place, so that its style and comments stay."""
    for key in [key for key in old if key not in new]:
        del old[key]
    for key, value in new.items():
        if old.get(key) != value:
            old[key] = value


def _round_trip(text: str = "") -> Any:
    """A reader and writer that keeps this text's comments, quotes and indents."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = _WIDTH
    yaml.explicit_start = bool(re.search(r"^---\s", text, re.MULTILINE)) or None
    nested = re.search(r"^[^\s#-][^\n]*:[^\S\n]*\n( +)[^\s#-]", text, re.MULTILINE)
    offset = 2 if _INDENTED_LIST.search(text) else 0
    yaml.indent(mapping=len(nested[1]) if nested else 2, sequence=offset + 2, offset=offset)
    if re.search(r":[^\S\n]+null\b", text):  # else an empty value is left empty
        yaml.Representer = _with_nulls()
    return yaml


def _with_nulls() -> Any:
    """A class of its own: representers are added to classes, for every file to come."""
    from ruamel.yaml.representer import RoundTripRepresenter

    class Nulls(RoundTripRepresenter):
        pass

    Nulls.add_representer(type(None), lambda made, _: made.represent_scalar("tag:yaml.org,2002:null", "null"))
    return Nulls
