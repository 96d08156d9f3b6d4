"""The config that a run is in, the one that it died with, and the longest batch that it can meet. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from autotune.recover.facts import Action, Batch, Change, Ended, Incident, Phase, Progress, Settings
from autotune.values import TrainingConfig, Verdict, from_json

_ROUNDED_TO = 8  # tokens: what collators pad to
_OF_MEMORY = (Verdict.DEVICE_OOM, Verdict.SPILL)
_SAME_NAME = tuple(
    item.name for item in fields(TrainingConfig) if item.name in {named.name for named in fields(Settings)}
)


def config_of(settings: Settings, progress: Progress, *, tokens: int | None = None) -> TrainingConfig | None:
    """What a run trains with, as far as its command and its trainer say, at `tokens`; None: no micro batch is known.

    What neither says is `TrainingConfig`'s default, and what no config can be is left out.
    """
    micro = progress.micro_batch_size or settings.micro_batch_size
    length = tokens or longest_batch(settings, progress, None) or 1
    if micro is None:
        return None
    own: dict[str, Any] = {name: getattr(settings, name) for name in _SAME_NAME}
    if own["gradient_checkpointing"] is None and progress.gradient_checkpointing is not None:
        own["gradient_checkpointing"] = "full" if progress.gradient_checkpointing else "off"
    data = {name: value for name, value in own.items() if value is not None}
    sizes = {
        "sequence_length": length,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": progress.gradient_accumulation_steps
        or settings.gradient_accumulation_steps
        or 1,
        "world_size": progress.world_size or 1,
        "eval_micro_batch_size": progress.eval_micro_batch_size or settings.eval_micro_batch_size,
    }
    try:
        return from_json(TrainingConfig, {**data, **sizes})
    except (ValueError, TypeError):  # a trainer's word that autotune has none for ("axolotl", attention "flex")
        kept = {"gradient_checkpointing": data.get("gradient_checkpointing", "off")}
        return from_json(TrainingConfig, {**kept, **sizes})


def longest_batch(settings: Settings, progress: Progress, died_on: Batch | None) -> int | None:
    """Tokens of the longest sample that the run can meet: its dataset's, cut at its sequence length; else that length;
    never less than what was seen. None: nothing is known.
    """
    limit, longest = settings.sequence_length, progress.dataset_longest
    if longest is not None and not settings.packing:
        longest = math.ceil(longest / _ROUNDED_TO) * _ROUNDED_TO
        limit = longest if limit is None else min(limit, longest)
    seen = [batch.tokens for batch in (progress.longest_seen, died_on) if batch is not None]
    return max([*seen, *([limit] if limit else [])], default=None)


def died_with(config: TrainingConfig, batch: Batch | None) -> TrainingConfig:
    """`config` at the size of the micro batch that it ran out of memory on; at its own where that was not told."""
    if batch is None or batch.samples < 1 or batch.tokens < 1:
        return config
    return replace(config, micro_batch_size=batch.samples, sequence_length=batch.tokens)


def died_earlier(
    original: Settings, history: Iterable[Incident], progress: Progress, *, tokens: int | None = None
) -> list[TrainingConfig]:
    """What earlier attempts of this run ran out of memory with in training, the changes between them replayed.

    `original` is what the command itself says, `progress` the newest attempt's.
    """
    settings, found = original, []
    for incident in history:
        silent = incident.phase is Phase.START and incident.decision.action is Action.STEP_DOWN  # it reports nothing
        trained = incident.phase is Phase.TRAIN or silent
        of_training = trained and incident.judgement.verdict in _OF_MEMORY
        then = replace(
            progress,
            micro_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            eval_micro_batch_size=None,
            gradient_checkpointing=None if settings.gradient_checkpointing else progress.gradient_checkpointing,
        )
        config = config_of(settings, then, tokens=tokens)
        if of_training and config is not None:
            found.append(died_with(config, incident.batch))
        settings = changed(settings, incident.decision.change)
    return found


def changed(settings: Settings, change: Change) -> Settings:
    """`settings` with what of `change` they have a name for."""
    names = {item.name for item in fields(Settings)}
    known: dict[str, Any] = {name: value for name, value in change.items() if name in names}
    return replace(settings, **known)


def batch_of_death(ended: Ended) -> Batch | None:
    return ended.death.batch if ended.death else None
