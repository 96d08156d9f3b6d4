"""What was measured on this machine of a card that is asked about, for `estimate`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import autotune
from autotune.errors import InvalidRequest
from autotune.hardware.cards import Card, find_card
from autotune.hardware.sizes import format_bytes
from autotune.predict.learned import Learned, learn
from autotune.predict.store import library_versions
from autotune.values import GIB, ModelSource, Origin
from gpu_db.store import read_store, stored_databases

NEWEST = 50  # trials: reading one takes 0.2 ms, and an estimate is to stay quick
_SLUG = re.compile(r"(?P<name>.+)-(?P<size>\d+)gib")


def learned_here(card: Card, model: ModelSource, home: Path | None = None) -> Learned | None:
    """What the card's database teaches of this autotune and the installed libraries, and of the driver that it was last
    used with; None where there is none on this machine. Raises `StoreError`.
    """
    path = next((path for path in stored_databases(home) if is_of_card(path.stem, card)), None)
    if path is None:
        return None
    with read_store(path, card.name, busy_timeout_s=1.0) as store:
        trials = store.trials(latest=NEWEST)
    newest = next((trial for trial in reversed(trials) if trial.origin is not Origin.DATABASE), None)
    if newest is None:
        return None
    installed: dict[str, Any] = {**library_versions(), "autotune": autotune.__version__}
    environment = replace(newest.environment, **installed)
    return learn(trials, environment, model_fingerprint=model.fingerprint)


def is_of_card(slug: str, card: Card) -> bool:
    """Whether a device of this slug is this card: by its name, and by a size between what is usable and what is sold.

    A driver's own total lies between: an A100 80GB has 80 GiB by NVML and 79.1 GiB as a program sees it.
    """
    parts = _SLUG.fullmatch(slug)
    if parts is None or not int(card.memory_bytes / GIB) <= int(parts["size"]) <= card.memory_nominal_gib:
        return False
    try:
        return find_card(f"{parts['name'].replace('-', ' ')} {card.memory_nominal_gib}gb").card == card
    except InvalidRequest:
        return False


def learned_line(learned: Learned) -> str | None:
    """What is taken from here, in one line for people; None where nothing can be."""
    facts = []
    if learned.context:
        facts.append(f"context {format_bytes(round(learned.context.median))}")
    if learned.time:
        facts.append(f"speed × {1 / learned.time.median:.2f}")
    if learned.memory:
        facts.append(f"memory × {learned.memory.median:.3f}")
    if not facts:
        return None
    count = f"The newest {learned.trials}" if learned.trials == NEWEST else f"{learned.trials}"
    trials = "trial of this card was" if learned.trials == 1 else "trials of this card were"
    return f"{count} {trials} measured here: {', '.join(facts)}"
