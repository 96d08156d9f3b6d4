"""fit.yaml: a fitted config with what was measured and where it came from, written whole or not at all."""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest
from autotune.values import TrainingConfig, from_json, to_json

SCHEMA = "autotune.fit/1"
_HEADER = (
    "# A fit by autotune: `autotune export` writes it in a trainer's own words. Memory in bytes, time in seconds.\n"
)
_KEYS = {item.name: item for item in fields(TrainingConfig)}
_REQUIRED = [name for name, item in _KEYS.items() if item.default is MISSING]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitFile:
    """What a fit file says. `document` is all of it, as plain data."""

    config: TrainingConfig
    model: str
    gpu: dict[str, Any]
    document: dict[str, Any]


def write_fit(path: Path, document: dict[str, Any], *, force: bool) -> None:
    """Write `document` (what `fit --json` prints, less its trials) as YAML.

    Raises InvalidRequest as `write_file` does.
    """
    import yaml

    text = yaml.safe_dump(to_json(document), sort_keys=False, allow_unicode=True, width=120)
    write_file(path, _HEADER + text, force=force)


def read_fit(path: Path) -> FitFile:
    """The fit in `path`, YAML or the JSON that `fit --json` printed.

    Raises InvalidRequest, saying what is wrong and with which key, for anything else.
    """
    document = _load(path)
    schema = document.get("schema")
    if schema != SCHEMA:
        raise InvalidRequest(_wrong_schema(path, schema))
    config = document.get("config")
    if config is None:
        status = document.get("status")
        raise InvalidRequest(f"{path}: holds no config (its status is {status}); fit again with other options")
    if not isinstance(config, dict):
        raise InvalidRequest(f"{path}: config must be a mapping of names to values; fit again")
    gpu = document.get("gpu") or {}
    if not isinstance(gpu, dict):
        raise InvalidRequest(f"{path}: gpu must be a mapping of names to values; fit again")
    return FitFile(config=_config(path, config), model=_model(path, document), gpu=gpu, document=document)


def write_file(path: Path, content: str | bytes, *, force: bool) -> None:
    """Write `content` (text as UTF-8) to `path` in one go: what was there stays whole until the new file is on disk.

    Raises InvalidRequest where the file exists and `force` is not given, or where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _check_target(path, force=force)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidRequest(
            f"{path}: cannot be written ({error.strerror or error}); make room or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_target(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise InvalidRequest(f"{path}: is a folder; give a file name")
    if path.exists() and not force:
        raise InvalidRequest(f"{path}: exists already; give --force to overwrite it, or another --output")
    if not path.parent.is_dir():
        raise InvalidRequest(f"{path}: its folder does not exist; make {path.parent} first")


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequest(f"{path}: no such file; write one with: autotune fit --output {path}") from error
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path}: is not YAML ({_first_line(error)}); correct it or fit again") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise InvalidRequest(f"{path}: is not a fit file; write one with: autotune fit --output FILE")
    return document


def _wrong_schema(path: Path, schema: object) -> str:
    if str(schema).startswith("autotune.fit/"):
        return f"{path}: is of schema {schema}, this autotune reads {SCHEMA}; fit again, or install the other version"
    return f"{path}: is not a fit file (schema {schema}); write one with: autotune fit --output FILE"


def _model(path: Path, document: Mapping[str, Any]) -> str:
    """The model's name, written alone or with facts about it."""
    model = document.get("model")
    name = model.get("name") if isinstance(model, dict) else model
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{path}: does not say which model it is for; add `model: ID`")
    return name


def _config(path: Path, data: dict[str, Any]) -> TrainingConfig:
    for key in data:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(_KEYS)}"
            raise InvalidRequest(f"{path}: unknown key config.{key}; {hint}")
    for key in _REQUIRED:
        if key not in data:
            raise InvalidRequest(f"{path}: config.{key} is missing; add it or fit again")
    data = {key: _meant(key, value) for key, value in data.items()}
    smallest = dict.fromkeys(_REQUIRED, 1)
    for key, value in data.items():
        try:
            from_json(TrainingConfig, smallest | {key: value})
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{path}: config.{key}: {error}; correct it or fit again") from error
    return from_json(TrainingConfig, data)


def _meant(key: str, value: Any) -> Any:
    """What a hand-written value stands for: YAML reads a bare `off` as false, and one module needs no list."""
    if key == "gradient_checkpointing" and value is False:
        return "off"
    if key == "target_modules" and isinstance(value, str):
        return [value]
    return value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
