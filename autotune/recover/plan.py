"""What one attempt is told (`plan.json`), and what a run must remember to go on after its supervisor was killed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest, StoreError
from autotune.recover.facts import PLAN_SCHEMA, PLAN_VARIABLE, Incident, Settings
from autotune.recover.json_file import write_json
from autotune.values import from_json, to_json

STATE_SCHEMA = "autotune.run/1"
_STATE = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that a run's next attempt depends on."""

    run_id: str
    argv: tuple[str, ...]
    cwd: str
    attempts: int = 0  # begun
    changed: dict[str, Any] | None = None  # settings that differ from the command's own
    incidents: tuple[Incident, ...] = ()
    began_at: float | None = None  # `time.time()` of the first attempt: older checkpoints are another run's
    leftovers: dict[str, int] | None = None  # of another run, in the output folder at the beginning; None: not known
    output_dir: str | None = None  # as the command or its trainer said
    finished: bool = False  # it ended well, or was stopped for good
    exit_code: int | None = None


def attempt_folder(folder: Path, number: int) -> Path:
    return folder / f"attempt-{number}"


def write_plan(
    folder: Path, *, run_id: str, number: int, settings: Settings, changed: Mapping[str, Any], resume: Path | None
) -> dict[str, str]:
    """Write the plan of attempt `number`; gives the variables that tell a trainer of it. Raises `StoreError`."""
    place = attempt_folder(folder, number)
    plan = {
        "schema": PLAN_SCHEMA,
        "run": run_id,
        "attempt": number,
        "config": {key: value for key, value in asdict(settings).items() if value is not None} | dict(changed),
        "changed": dict(changed),
        "resume_from_checkpoint": str(resume) if resume else None,
        "output_dir": settings.output_dir,
        "events": str(place / "events.jsonl"),
        "control": str(place / "control.json"),
    }
    path = place / "plan.json"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, plan)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}): make room, or give another --run-folder"
        ) from error
    return {PLAN_VARIABLE: str(path)}


def read_state(folder: Path) -> RunState | None:
    """None where there is none. Raises `InvalidRequest` for what is no state of this version."""
    path = folder / _STATE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} cannot be read ({error}): start the run anew in another --run-folder") from error
    try:
        if document["schema"] != STATE_SCHEMA:
            raise ValueError(f"its schema is {document['schema']}")
        return from_json(RunState, document)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"{path} is no state of a run that this version reads ({error}): start the run anew in another --run-folder"
        ) from error


def write_state(folder: Path, state: RunState) -> None:
    """Whole or not at all, so that a kill at any moment leaves the old or the new one. Raises `StoreError`."""
    try:
        write_json(folder / _STATE, {"schema": STATE_SCHEMA, **to_json(state)})
    except OSError as error:
        raise StoreError(f"{folder / _STATE} cannot be written ({error.strerror}): make room on that disk") from error


def with_incident(state: RunState, incident: Incident) -> RunState:
    return replace(state, incidents=(*state.incidents, incident))
