"""A declared grid: values of settings, and the configs of their product at a request's effective batch size."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.configfile import field_value, read_keys
from autotune.errors import InvalidRequest, UsageError
from autotune.search.dimensions import SEARCHED
from autotune.search.runnable import unrunnable
from autotune.search.space import build_space
from autotune.values import Device, FitRequest, TrainingConfig, from_json, to_json

#: Fields of TrainingConfig that a grid may declare: accumulation follows, and a sweep runs on one device.
FIELDS = tuple(
    item.name
    for item in dataclasses.fields(TrainingConfig)
    if item.name not in ("gradient_accumulation_steps", "world_size")
)
_MOST = 100_000  # configs of a grid: years of probes
_PLAIN = {"true": True, "false": False}

Grid = Mapping[str, tuple[Any, ...]]  # field: its values, as JSON has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a sweep measures, in turn, and why the rest of its grid is left out."""

    configs: tuple[TrainingConfig, ...]
    skipped: Mapping[str, int]  # reason: how many combinations


def parse_grid(texts: Sequence[str], option: str) -> Grid:
    """The grid of texts like "micro_batch_size=1,2,4". Names within a value of target_modules are joined by "+".

    Raises `UsageError`.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not name or not values:
            raise UsageError(f"{option} {text[:80]}: give a field and its values, such as micro_batch_size=1,2,4")
        name = name.replace("-", "_")
        if name in grid:
            raise UsageError(f"{option}: {name} is declared twice: give all its values in one")
        try:
            grid[name] = _values(name, [_plain(part.strip()) for part in values.split(",")])
        except ValueError as error:
            raise UsageError(f"{option} {text[:80]}: {error}") from error
    return grid


def read_grid(path: Path) -> Grid:
    """The grid of a YAML or JSON file: fields, each with a list of values. Raises `InvalidRequest`."""
    grid: dict[str, tuple[Any, ...]] = {}
    for name, values in read_keys(path).items():
        try:
            grid[name] = _values(name, values if isinstance(values, list) else [values])
        except ValueError as error:
            raise InvalidRequest(f"{path}: {error}") from error
    return grid


def plan_of_grid(grid: Grid, request: FitRequest, device: Device, installed: Collection[str]) -> Plan:
    """The product of the grid in declared order, settings that it leaves out as the request has them.

    Micro batch sizes go up within the other settings, so that what runs out of memory comes late. Raises
    `InvalidRequest` where nothing can run.
    """
    samples = request.start.effective_batch_size // request.start.world_size
    sizes = sorted(grid.get("micro_batch_size", (samples,)))
    others = {name: values for name, values in grid.items() if name != "micro_batch_size"}
    count = len(sizes)
    for values in others.values():
        count *= len(values)
    if count > _MOST:
        raise InvalidRequest(f"the grid has {count:,} configs: declare fewer values, {_MOST:,} configs at most")
    found: dict[TrainingConfig, None] = {}
    skipped: Counter[str] = Counter()
    for values in itertools.product(*others.values()):
        for size in sizes:
            config = _config(request.start, dict(zip(others, values, strict=True)), size, samples)
            reason = _other_batch(config, request) or unrunnable(request, device, frozenset(installed), config)
            if reason is None:
                found[config] = None
            else:
                skipped[reason] += 1
    return _checked(Plan(configs=tuple(found), skipped=skipped))


def plan_of_space(request: FitRequest, device: Device, installed: Collection[str]) -> Plan:
    """All that a fit of this request may try. Raises `InvalidRequest` where that is nothing."""
    space = build_space(request, device, installed=installed)
    skipped: Counter[str] = Counter()
    found = []
    for config in space.configs():
        reason = space.legal(config)
        if reason is None:
            found.append(config)
        else:
            skipped[reason] += 1
    return _checked(Plan(configs=tuple(found), skipped=skipped))


def _checked(plan: Plan) -> Plan:
    if plan.configs:
        return plan
    why = "; ".join(f"{reason} ({count})" for reason, count in plan.skipped.items())
    raise InvalidRequest(f"nothing of this grid can run: {why}: declare other values")


def _config(start: TrainingConfig, settings: Mapping[str, Any], size: int, samples: int) -> TrainingConfig:
    data = {**to_json(start), **settings, "micro_batch_size": size}
    return from_json(TrainingConfig, {**data, "gradient_accumulation_steps": max(1, samples // size)})


def _other_batch(config: TrainingConfig, request: FitRequest) -> str | None:
    wanted = request.start.effective_batch_size
    if config.effective_batch_size == wanted:
        return None
    return f"micro_batch_size {config.micro_batch_size} does not divide the effective batch of {wanted}"


def _values(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    """Each once. Raises ValueError for an unknown field, and for a value that it cannot have."""
    if name not in FIELDS:
        raise ValueError(_unknown(name))
    found: dict[str, Any] = {}
    for value in values:
        modules = value.replace("+", ",") if name == "target_modules" and isinstance(value, str) else value
        plain = field_value(name, modules)
        if name == "sequence_length" and plain < 2:
            raise ValueError("sequence_length must be at least 2: of a sample with one token nothing is learned")
        found[repr(plain)] = plain
    if not found:
        raise ValueError(f"{name} has no values: name at least one, or leave the field out")
    return tuple(found.values())


def _unknown(name: str) -> str:
    if name in ("gradient_accumulation_steps", "world_size"):
        return f"{name} follows the micro batch and the effective batch: leave it out"
    near = difflib.get_close_matches(name[:80], FIELDS, n=1)
    return f"unknown field {name[:80]!r}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(FIELDS)}")


def _plain(text: str) -> Any:
    """A value of the command line as YAML would read it; off stays text."""
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"-?[0-9]*\.[0-9]+", text):
        return float(text)
    return _PLAIN.get(text.lower(), text)


def asked(request: FitRequest, config: TrainingConfig) -> FitRequest:
    """The request that a fit of `config`'s own length, rank and the like would make: it finds the trial again."""
    wanted = {
        name: getattr(config, name)
        for name in FIELDS
        if name not in SEARCHED and getattr(config, name) != getattr(request.start, name)
    }
    if not wanted:
        return request
    return replace(request, start=replace(request.start, **wanted), sequence_length_stated=True)
