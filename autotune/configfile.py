"""One training config in a YAML or JSON file: read, with every mistake named in one line."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.values import TrainingConfig, from_json

MAX_BYTES = 1 << 16  # of a config file: its 25 keys take one or two thousand
#: (smallest, largest) of numbers that no card could run beyond.
BOUNDS = {
    "sequence_length": (1, 10_000_000),
    "micro_batch_size": (1, 65_536),
    "gradient_accumulation_steps": (1, 65_536),
    "lora_rank": (1, 65_536),
    "lora_alpha": (1, 1_000_000),
    "eval_micro_batch_size": (1, 65_536),
}
_NEEDED = ("model", "sequence_length", "micro_batch_size")
_DTYPES = ("float32", "bfloat16", "float16")
_CHECKPOINTING = re.compile(r"off|full|offload|every_[1-9][0-9]{0,3}", re.ASCII)
_LONGEST = 60  # characters of a value in a message
_MANY_DIGITS = 10**30  # a number beyond is not printed: Python refuses to, of thousands of digits
#: What building a value of a YAML scalar raises: digits without end, `!!int abc`, a 31st of February.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What a config file says."""

    model: str  # an id, or a path, found from the file's folder
    config: TrainingConfig
    stated: frozenset[str] = frozenset()  # keys with a value; the rest of `config` are defaults


def read_config(path: Path) -> ConfigFile:
    """Raises `InvalidRequest`: no file, no YAML or JSON, unknown or missing keys, impossible values."""
    data = read_keys(path)
    known = [field.name for field in dataclasses.fields(TrainingConfig) if field.name != "world_size"]
    for key in data:
        if key not in known and key != "model":
            near = difflib.get_close_matches(key[:_LONGEST], ["model", *known], n=1)
            raise InvalidRequest(
                f"{path}: unknown key {_quoted(key)}: "
                + (f"did you mean {near[0]}?" if near else f"the keys are model, {', '.join(known)}")
            )
    for key in _NEEDED:
        if data.get(key) is None:
            raise InvalidRequest(f"{path}: {key} is missing: model, sequence_length and micro_batch_size are needed")
    model = data["model"]
    if not isinstance(model, str) or not model.strip():
        raise InvalidRequest(f"{path}: model must be an id or a path, not {_quoted(model)}")
    config = _config(data, path)
    stated = frozenset(key for key, value in data.items() if value is not None)
    return ConfigFile(model=_located(model, path), config=config, stated=stated)


# The file


def read_keys(path: Path) -> dict[str, Any]:
    """A file's keys, each with one plain value or a list of such. Nothing larger is ever built.

    Raises `InvalidRequest`: no file, no YAML or JSON, a key that is there twice, no keys.
    """
    text = text_of(path)
    return _of_json(text, path) if path.suffix.lower() == ".json" else _of_yaml(text, path)


def text_of(path: Path, *, most_bytes: int = MAX_BYTES, advice: str = "give a YAML or JSON file") -> str:
    """A config file's text. Raises `InvalidRequest`, each time with what to do: no file, too large, no text."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for, a device read without end
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise InvalidRequest(f"{path} cannot be read (it is {what}): {advice}")
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise InvalidRequest(
                f"{path} is larger than {most_bytes >> 10:,} KiB: give a config file, not a model or a dataset"
            )
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text: {advice}") from error


def _of_json(text: str, path: Path) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once([key for key, _ in found], path)
        return dict(found)

    try:
        # A number of more digits than any bound stays beyond it without the rest of them.
        data = json.loads(text, object_pairs_hook=pairs, parse_int=lambda digits: int(digits[:40]))
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise _no_config(path, line) from error
    if not isinstance(data, dict):
        raise _no_keys(path)
    for key, value in data.items():
        _check_plain(key, value, path)
    return data


def _of_yaml(text: str, path: Path) -> dict[str, Any]:
    import yaml

    try:  # the nodes alone: what an alias repeats is not built a second time
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        raise _no_config(path, f" (line {where.line + 1})" if where is not None else "") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise _no_keys(path)
    _check_once([str(key.value) for key, _ in root.value if isinstance(key, yaml.ScalarNode)], path)
    constructor = yaml.constructor.SafeConstructor()
    data: dict[str, Any] = {}
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidRequest(f"{path}: a key is a list or a mapping: write key: value lines")
        name = str(key.value)
        several = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(one, yaml.ScalarNode) for one in several):
            raise _not_plain(name, path)
        try:
            values = [constructor.construct_object(one) for one in several]
        except (*_UNREADABLE, yaml.YAMLError) as error:
            raise InvalidRequest(f"{path}: the value of {_quoted(name)} cannot be read: write it plainly") from error
        data[name] = values if isinstance(node, yaml.SequenceNode) else values[0]
    return data


def _check_once(keys: list[str], path: Path) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise InvalidRequest(f"{path}: {_quoted(key)} is there twice: keep one of them")
        seen.add(key)


def _check_plain(key: str, value: Any, path: Path) -> None:
    several = value if isinstance(value, list) else [value]
    if any(isinstance(one, list | dict) for one in several):
        raise _not_plain(key, path)


def _not_plain(key: str, path: Path) -> InvalidRequest:
    return InvalidRequest(f"{path}: {_quoted(key)} holds more than one value or a list of names: write key: value")


def _no_config(path: Path, line: str) -> InvalidRequest:
    return InvalidRequest(f"{path} is neither YAML nor JSON{line}: mend it, or write key: value lines")


def _no_keys(path: Path) -> InvalidRequest:
    return InvalidRequest(f"{path} holds no keys: write lines such as micro_batch_size: 4")


# The values


def _config(data: dict[str, Any], path: Path) -> TrainingConfig:
    if "quantization" in data and data["quantization"] is None:
        data = {**data, "quantization": "none"}
    stated = {key: value for key, value in data.items() if key != "model" and value is not None}
    try:
        values = {key: field_value(key, value) for key, value in stated.items()}
    except ValueError as error:
        raise InvalidRequest(f"{path}: {error}") from error
    try:
        return from_json(TrainingConfig, values)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path}: {error}") from error


def field_value(key: str, value: Any) -> Any:
    """A value as JSON has it for this field of `TrainingConfig`. Raises ValueError, saying what the field takes."""
    if value is False:  # YAML reads a bare off as that
        value = {"gradient_checkpointing": "off", "quantization": "none"}.get(key, value)
    if (wanted := _wanted(key, value)) is not None:
        raise ValueError(f"{key} must be {wanted}, not {_quoted(value)}")
    return _names(value) if key == "target_modules" else value


_FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}


def _wanted(key: str, value: Any) -> str | None:
    """What the key takes, where that is not this value."""
    if key in BOUNDS:
        if isinstance(value, bool) or not isinstance(value, int):
            return "a whole number"
        smallest, largest = BOUNDS[key]
        return None if smallest <= value <= largest else f"from {smallest} to {largest:,}"
    kind: Any = type(_FIELDS[key].default)
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if key == "lora_dropout":
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number, such as 0.05"
        return None if 0 <= value < 1 else "at least 0 and below 1"
    if key == "target_modules":
        return None if _names(value) else "one or more names of modules, or all-linear"
    if key == "gradient_checkpointing":
        fits = isinstance(value, str) and _CHECKPOINTING.fullmatch(value)
        return None if fits else "off, full, offload or every_N (N from 1 to 9,999)"
    if key == "optimizer":
        return None if isinstance(value, str) and value.strip() else "the name of an optimizer, such as adamw_8bit"
    words = _DTYPES if key in ("compute_dtype", "adapter_dtype") else tuple(kind)
    return None if isinstance(value, str) and value in words else f"one of {', '.join(words)}"


def _names(value: Any) -> list[str]:
    """Names of modules, of a list or with commas; none where something else is there."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return []
    names = [part.strip() for part in parts]
    return names if all(names) else []


def _quoted(value: Any) -> str:
    """A value of any size and type in a few characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[:_LONGEST] + "…")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= _MANY_DIGITS:
        return "a number of more than 30 digits"
    return str(value)[:_LONGEST] if isinstance(value, int | float | datetime.date) else f"a {type(value).__name__}"


def _located(model: str, path: Path) -> str:
    """A path in a config file is seen from the file, an id is an id."""
    beside = path.parent / model
    return str(beside) if os.path.exists(beside) else model  # os.path's is false for a name that no path can have
