"""One training config in a YAML or JSON file: read, with every mistake named in one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.values import TrainingConfig, from_json

MAX_BYTES = 1 << 20  # of a config file
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What a config file says."""

    model: str  # an id, or a path, found from the file's folder
    config: TrainingConfig


def read_config(path: Path) -> ConfigFile:
    """Raises `InvalidRequest`: no file, no YAML or JSON, unknown or missing keys, impossible values."""
    data = _data(path)
    known = [field.name for field in dataclasses.fields(TrainingConfig) if field.name != "world_size"]
    for key in data:
        if key not in known and key != "model":
            near = difflib.get_close_matches(str(key), ["model", *known], n=1)
            raise InvalidRequest(
                f"{path}: unknown key {str(key)[:60]!r}: "
                + (f"did you mean {near[0]}?" if near else f"the keys are model, {', '.join(known)}")
            )
    for key in _NEEDED:
        if data.get(key) is None:
            raise InvalidRequest(f"{path}: {key} is missing: model, sequence_length and micro_batch_size are needed")
    model = data["model"]
    if not isinstance(model, str) or not model.strip():
        raise InvalidRequest(f"{path}: model must be an id or a path, not {model!r}")
    return ConfigFile(model=_located(model, path), config=_config(data, path))


def _data(path: Path) -> dict[str, Any]:
    import yaml

    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidRequest(f"{path} is larger than 1 MiB: give a config file, not a model or a dataset")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}): give a YAML or JSON file") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is no text: give a YAML or JSON file") from error
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where is not None else ""
        raise InvalidRequest(f"{path} is neither YAML nor JSON{line}: mend it, or write key: value lines") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"{path} holds no keys: write lines such as sequence_length: 4096")
    return data


def _config(data: dict[str, Any], path: Path) -> TrainingConfig:
    values = {key: value for key, value in data.items() if key != "model" and value is not None}
    for key in ("gradient_checkpointing",):  # YAML reads a bare off as False
        if values.get(key) is False:
            values[key] = "off"
    if isinstance(values.get("quantization"), bool) or data.get("quantization", "nf4") is None:
        values["quantization"] = "none"
    if isinstance(values.get("target_modules"), str):
        values["target_modules"] = [part.strip() for part in values["target_modules"].split(",")]
    for key, (smallest, largest) in BOUNDS.items():
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidRequest(f"{path}: {key} must be a whole number, not {str(value)[:60]!r}")
        if value is not None and not smallest <= value <= largest:
            raise InvalidRequest(f"{path}: {key} must be from {smallest} to {largest:,}, not {value}")
    for field in dataclasses.fields(TrainingConfig):
        if field.type == "bool" and not isinstance(values.get(field.name, False), bool):
            raise InvalidRequest(f"{path}: {field.name} must be true or false, not {str(values[field.name])[:60]!r}")
    if not all(isinstance(name, str) for name in values.get("target_modules", [])):
        raise InvalidRequest(f"{path}: target_modules must be names of modules, or all-linear")
    try:
        return from_json(TrainingConfig, values)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{path}: {_plainly(error, values)}") from error


def _plainly(error: Exception, values: dict[str, Any]) -> str:
    """An enum's complaint with the words that it takes."""
    text = str(error)
    for field in dataclasses.fields(TrainingConfig):
        kind: Any = type(field.default)
        if field.name in values and hasattr(kind, "__members__") and values[field.name] not in list(kind):
            return f"{field.name} must be one of {', '.join(kind)}, not {str(values[field.name])[:60]!r}"
    return text


def _located(model: str, path: Path) -> str:
    """A path in a config file is seen from the file, an id is an id."""
    beside = path.parent / model
    return str(beside) if beside.exists() else model
