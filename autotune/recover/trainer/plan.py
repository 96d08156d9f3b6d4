"""The plan that a training process runs under, as the process reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autotune.errors import InvalidRequest
from autotune.recover.facts import PLAN_SCHEMA, PLAN_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one attempt is told."""

    run: str | None = None
    attempt: int | None = None
    config: dict[str, Any] = field(default_factory=dict)  # all settings that are known
    changed: dict[str, Any] = field(default_factory=dict)  # only those that differ from the command's own
    resume_from_checkpoint: str | None = None
    output_dir: str | None = None
    events: str | None = None  # where to tell what happens
    control: str | None = None  # where to look for what is asked
    stop_file: str | None = None  # where ranks agree on their last step
    emergency: bool = False  # save before dying even where the trainer itself saves nothing


def read_plan(environ: Mapping[str, str] = os.environ) -> Plan | None:
    """The plan named in the environment; None without one. Raises `InvalidRequest` where it cannot be read."""
    path = environ.get(PLAN_VARIABLE)
    if not path:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        return _plan(document)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidRequest(
            f"the plan {path} cannot be read ({error}): start the command through `autotune run`, "
            f"or unset {PLAN_VARIABLE}"
        ) from error


def _plan(document: Any) -> Plan:
    if not isinstance(document, dict) or document.get("schema") != PLAN_SCHEMA:
        raise ValueError(f"it is not {PLAN_SCHEMA}")
    control = document.get("control")
    return Plan(
        run=document.get("run"),
        attempt=document.get("attempt"),
        config=dict(document.get("config") or {}),
        changed=dict(document.get("changed") or {}),
        resume_from_checkpoint=document.get("resume_from_checkpoint"),
        output_dir=document.get("output_dir"),
        events=document.get("events"),
        control=control,
        stop_file=document.get("stop_file") or (f"{control}.stop" if control else None),
        emergency=bool(document.get("emergency", False)),
    )
