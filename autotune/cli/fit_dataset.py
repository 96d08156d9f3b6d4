"""What `--dataset` and `--tokenizer` make of a fit: its lengths in the request, and lines that say what was counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune.cli.words import say
from autotune.dataset import DatasetFacts, describe_dataset
from autotune.errors import InvalidRequest, UsageError
from autotune.lengths import BYTES_PER_TOKEN, TEMPLATE_TOKENS, Lengths, NoText, read_lengths
from autotune.mix import worst_length
from autotune.values import FitRequest, LengthMix, to_json

_COUNTED = {
    "tokens": "as tokenised",
    "tokenizer": "counted by the tokenizer, with an end token each",
    "estimate": f"GUESSED as UTF-8 bytes ÷ {BYTES_PER_TOKEN}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What was read of `--dataset`."""

    facts: DatasetFacts
    lengths: Lengths | None  # None: nothing in it is known to be text


def read_dataset(path: Path | None, tokenizer: str | None) -> Dataset | None:
    """Read it whole; None where none is given. Raises `InvalidRequest`, and `UsageError` for a tokenizer alone."""
    if path is None:
        if tokenizer is not None:
            raise UsageError("--tokenizer counts the tokens of a dataset: give --dataset too")
        return None
    facts = describe_dataset(path)
    if tokenizer:
        say(f"Counting the tokens of {facts.samples:,} samples …")
    try:
        lengths = read_lengths(path, tokenizer)
    except NoText as error:
        if tokenizer:
            raise
        say(f"Note: {error}. Until then every sample counts as one of full length.")
        lengths = None
    if lengths is not None and lengths.tokens[-1] < 2:
        raise InvalidRequest(f"{path}: no sample has more than one token, so nothing can be learned; check its text")
    return Dataset(facts=facts, lengths=lengths)


def with_dataset(request: FitRequest, dataset: Dataset | None) -> FitRequest:
    """The request at the longest batch that the dataset can make, with its mix of lengths; said on stderr."""
    if dataset is None or dataset.lengths is None:
        return request
    wanted = request.start.sequence_length
    mix = dataset.lengths.mix(wanted)
    length = worst_length(mix, wanted)
    shortest = request.min_sequence_length
    say(f"Dataset: {mix_words(mix)}.")
    say(f"{_memory(mix, wanted, length)}; speed is measured at this mix of lengths.")
    if dataset.lengths.has_messages:
        say(f"Note: no chat template is applied: {TEMPLATE_TOKENS} tokens a message are counted for it.")
    if mix.empty:
        say(f"Note: {mix.empty:,} samples hold no token and are left out of this.")
    return replace(
        request,
        start=replace(request.start, sequence_length=length),
        min_sequence_length=min(shortest, length) if shortest is not None else None,
        lengths=mix,
    )


def mix_words(mix: LengthMix) -> str:
    """ "1,200 samples, 310 tokens on average, the longest 1,980 (as tokenised); 4 (0.3 %) are truncated"."""
    words = f"{mix.samples:,} samples, {mix.mean_tokens:,.0f} tokens on average, the longest {mix.longest:,}"
    words += f" ({_COUNTED[mix.counted]})"
    if mix.truncated:
        words += (
            f"; {mix.truncated:,} ({mix.truncated / mix.samples:.1%}) are truncated, from {mix.longest_untruncated:,}"
        )
    return words


def dataset_document(dataset: Dataset, mix: LengthMix | None) -> dict[str, Any]:
    """For `--json`: the file, and its lengths as the request has them; null where they are not known."""
    facts = to_json(dataset.facts)
    if mix is None:
        return {**facts, "lengths": None}
    return {**facts, "lengths": {**to_json(mix), "mean_tokens": mix.mean_tokens}}


def _memory(mix: LengthMix, wanted: int, length: int) -> str:
    if not mix.is_exact:
        return f"Memory is proven at all of {wanted:,} tokens, since the longest is not known (--tokenizer counts it)"
    if length < wanted:
        return f"Memory is proven at {length:,} tokens, the longest batch that a run can meet, not at {wanted:,}"
    return f"Memory is proven at {length:,} tokens, the longest batch that a run can meet"
