"""What a fit says where nothing fits: the closest trial, and what would help."""

from __future__ import annotations

from autotune.hardware.sizes import format_bytes
from autotune.recommendation import closest_trial, missing_bytes
from autotune.values import Consent, FitRequest, Recommendation


def nothing_fits_line(result: Recommendation) -> str:
    """One line: what came closest, how much it lacked, and what would help."""
    why = result.notes[-1] if result.notes else "nothing fits"
    why = why if why.startswith("nothing fits") else f"nothing fits: {why}"
    known = " (known from the database, nothing was run; --fresh measures again)" if result.from_database else ""
    return f"{why}{known}{_closest_words(result)}. {_consents_words(result)}"


def _closest_words(result: Recommendation) -> str:
    closest = closest_trial(result)
    if closest is None:
        return ""
    config, missing = closest.config, missing_bytes(closest.judgement, closest.report)
    lacks = f", which lacked at least {format_bytes(missing)}" if missing else ""
    return (
        f"; closest: sequence length {config.sequence_length}, micro batch {config.micro_batch_size},"
        f" checkpointing {config.gradient_checkpointing}{lacks}"
    )


def _consents_words(result: Recommendation) -> str:
    """What is predicted to make it fit; without a prediction all that could be tried."""
    if not result.consents:
        return f"Try {', '.join(_untried(result.request))}"
    fits = [_offer(one) for one in result.consents if one.fits]
    others = [f"{_offer(one)} (needs {format_bytes(one.needed_bytes)})" for one in result.consents if not one.fits]
    words = f"Predicted to fit with {' or '.join(fits)}" if fits else "Try a smaller --model"
    return f"{words}; not with {', '.join(others)}" if others else words


def _offer(consent: Consent) -> str:
    if consent.kind == "more_memory":
        return consent.option or f"a card with {format_bytes(consent.needed_bytes)}"
    return consent.option or "a search without --fix, --exclude and --space"


def _untried(request: FitRequest) -> list[str]:
    start, ways = request.start, []
    if request.min_sequence_length is None and request.sequence_length_stated and start.sequence_length >= 4:
        ways.append(f"--min-sequence-length {start.sequence_length // 2}")
    if request.min_lora_rank is None and start.lora_rank > 4:
        ways.append("--min-lora-rank 4")
    if not request.allow_near:
        ways.append("--allow near")
    return [*ways, "a smaller --model or a larger --memory-limit"]
