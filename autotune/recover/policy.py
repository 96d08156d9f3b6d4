"""How often a run may begin again, and what counts as getting on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from autotune.recover.facts import Ended, Incident
from autotune.values import Judgement


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How far a run is taken before a person is asked."""

    restarts: int = 5  # that bring no new checkpoint, within `window_s`
    window_s: float = 3600.0
    most_restarts: int = 20  # that bring no new checkpoint, however long they take
    retries: int = 2  # of the same config, after a lost device, a stall or a kill, without a new checkpoint
    ambiguous_retries: int = 1
    on_tenant: Literal["wait", "step_down"] = "wait"
    tenant_wait_s: float = 600.0  # at most, for memory that another process took
    pause_s: float = 5.0  # before the same config is run again; doubled each time


def restarts_spent(ended: Ended, history: Sequence[Incident], policy: Policy, now: datetime) -> str | None:
    """That the restarts without progress are used up, in words; None while they are not."""
    idle = since_progress(ended, history)
    if len(idle) >= policy.most_restarts:
        return f"{len(idle)} restarts brought no new checkpoint."
    recent = [one for one in idle if (now - _time_of(one, now)).total_seconds() < policy.window_s]
    if len(recent) >= policy.restarts:
        return f"{len(recent)} restarts within {policy.window_s / 60:.0f} minutes brought no new checkpoint."
    return None


def since_progress(ended: Ended, history: Sequence[Incident]) -> Sequence[Incident]:
    """The newest incidents after which no attempt has written a checkpoint that the one before it had not."""
    progress = ended.progress
    if progress.checkpoint_step is not None and progress.checkpoint_step > (progress.first_step or 0):
        return ()
    for place in range(len(history) - 1, -1, -1):
        before = history[place - 1].resumed_from if place else None
        if history[place].resumed_from not in (None, before):
            return history[place:]
    return history


def is_same_place(ended: Ended, judgement: Judgement, history: Sequence[Incident]) -> bool:
    """Whether the same config has died of the same before, at the same step and phase."""
    here = (judgement.verdict, ended.phase, last_step(ended))
    for incident in reversed(history):
        if incident.decision.change:
            return False
        if (incident.judgement.verdict, incident.phase, incident.step) == here:
            return True
    return False


def last_step(ended: Ended) -> int | None:
    """The last one finished."""
    step = ended.death.step if ended.death else None
    return ended.progress.step if step is None else step


def _time_of(incident: Incident, now: datetime) -> datetime:
    """When it was; now, where that cannot be read."""
    try:
        found = datetime.fromisoformat(incident.time_utc)
    except ValueError:
        return now
    return found if found.tzinfo else found.replace(tzinfo=now.tzinfo)
