"""What happened to a run, in words for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotune.recover.facts import Batch, Ended, EndedBy, Phase
from autotune.values import Judgement, Verdict

_NAMES = {
    "micro_batch_size": "micro batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "gradient checkpointing",
    "eval_micro_batch_size": "evaluation batch",
    "dataloader_workers": "data-loader workers",
    "allocator": "allocator",
}
_MESSAGE = 200  # characters of an error that are shown


def place_in_words(ended: Ended) -> str:
    """Where it ended: "in training step 138 (4 × 1,870 tokens)", "while evaluating after step 120"."""
    death = ended.death
    step = death.step if death and death.step is not None else ended.progress.step
    after = f" after step {step:,}" if step else ""
    batch = f" ({batch_in_words(death.batch)})" if death and death.batch else ""
    return {
        Phase.START: "at its start",
        Phase.LOAD: "while loading",
        Phase.TRAIN: f"in training step {(step or 0) + 1:,}{batch}",
        Phase.EVALUATE: f"while evaluating{after}{batch}",
        Phase.SAVE: f"while saving{after}",
        Phase.DONE: "after training",
    }[ended.phase]


def batch_in_words(batch: Batch) -> str:
    return f"{batch.samples} × {batch.tokens:,} tokens"


def error_in_words(ended: Ended, judgement: Judgement) -> str:
    """What it died of, to follow "it": "raised ValueError: bad", "made no progress", "was ended by signal 9"."""
    death = ended.death
    if death is not None and death.exception:
        message = " ".join(death.message.split())
        short = message if len(message) <= _MESSAGE else message[: _MESSAGE - 1] + "…"
        return f"raised {death.exception.rpartition('.')[2]}: {short}".rstrip(" :")
    if ended.ended_by in (EndedBy.STALL, EndedBy.START_LIMIT):
        return "made no progress"
    if judgement.verdict is Verdict.DEVICE_LOST:
        return "lost its device"
    if ended.exit_code is None and ended.signal is None:
        return "could not be started"
    if judgement.verdict in (Verdict.NOT_OOM, Verdict.DEVICE_OOM) and judgement.evidence:
        return f"said: {judgement.evidence[0]}"
    return (
        f"was ended by signal {ended.signal}" if ended.signal is not None else f"ended with exit code {ended.exit_code}"
    )


def change_in_words(change: Mapping[str, Any]) -> str:
    """ "micro batch 2, accumulation 8"."""
    return ", ".join(f"{_NAMES.get(name, name.replace('_', ' '))} {value}" for name, value in change.items())
