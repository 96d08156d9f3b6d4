"""How many tokens each sample of a dataset has: tokenised already, counted by a tokenizer, or guessed from bytes."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from autotune.dataset import Row, read_batches, read_rows
from autotune.errors import InvalidRequest
from autotune.mix import slice_means
from autotune.values import LengthMix

SLICES = 64
BYTES_PER_TOKEN = 4  # English text with a vocabulary of 32,000 to 150,000: 3.5 to 4.5; others far off, so it is said
TEMPLATE_TOKENS = 8  # of a message: ChatML and Llama 3 put 5 around it, and a template's own words come on top
END_TOKENS = 1  # a trainer ends a text with one where the tokenizer does not

Counted = Literal["tokens", "tokenizer", "estimate"]
Tokenize = Callable[[Sequence[str]], list[int]]  # texts to their numbers of tokens

_AT_ONCE = 1000  # texts
_LONGEST = 10**9  # tokens of a sample: more is a mistake
#: Fields of a sample that make its text, one after the other; the first set that is there. In brackets: where given.
TEXT_FIELDS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "[input]", "output"),
    ("instruction", "[input]", "response"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The tokens of each sample, ascending; those without one apart."""

    tokens: array[int]
    empty: int
    counted: Counted
    has_messages: bool = False  # a chat template is not applied: `TEMPLATE_TOKENS` stand for it

    def mix(self, sequence_length: int) -> LengthMix:
        """With samples truncated at `sequence_length`, in slices of equal weight."""
        cut = [min(length, sequence_length) for length in self.tokens]
        count = len(cut)
        upto = [(number + 1) / count for number in range(count)]
        means = slice_means(cut, upto, min(SLICES, count))
        return LengthMix(
            quantiles=tuple(round(mean, 2) for mean in means),
            samples=count,
            longest=cut[-1],
            longest_untruncated=self.tokens[-1],
            truncated=sum(length > sequence_length for length in self.tokens),
            empty=self.empty,
            counted=self.counted,
        )


class NoText(InvalidRequest):
    """A dataset without tokens and without a field of text that is known."""


def read_lengths(path: Path, tokenizer: str | None = None) -> Lengths:
    """Count every sample of `path`: by its `input_ids`, by its text, or by its `length`.

    Without `tokenizer` (a folder, a tokenizer.json or the id of a cached one) a text's tokens are a guess. Raises
    `NoText`, and InvalidRequest for what is broken, naming the sample.
    """
    tokenize = load_tokenizer(tokenizer) if tokenizer else guess
    counter = _Counter(path, tokenize, "tokenizer" if tokenizer else "estimate")
    batches = read_batches(path)
    found: Iterable[int] = counter.of_rows(read_rows(path)) if batches is None else counter.of_batches(batches)
    every = array("q", found)
    if not every:
        raise InvalidRequest(f"{path}: holds no samples; give a dataset with at least one")
    tokens = array("q", sorted(length for length in every if length > 0))
    if not tokens:
        raise InvalidRequest(f"{path}: not one of its {len(every)} samples holds a token; give a dataset with text")
    return Lengths(
        tokens=tokens,
        empty=len(every) - len(tokens),
        counted=counter.counted,
        has_messages=counter.has_messages,
    )


def load_tokenizer(name: str) -> Tokenize:
    """A tokenizer.json, a folder that holds one, or an id whose own is in the Hugging Face cache: nothing is fetched.

    Raises InvalidRequest.
    """
    from tokenizers import Tokenizer

    path = _tokenizer_file(name)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InvalidRequest(
            f"--tokenizer {name}: {path} cannot be read ({error}); save the tokenizer again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer.encode_batch_fast(list(texts))
        return [len(one.ids) + END_TOKENS if text else 0 for text, one in zip(texts, encoded, strict=True)]

    return tokenize


def guess(texts: Sequence[str]) -> list[int]:
    """Tokens as `BYTES_PER_TOKEN` has them, rounded up."""
    return [-(-len(text.encode()) // BYTES_PER_TOKEN) for text in texts]


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            raise InvalidRequest(
                f"--tokenizer {name}: the folder has no tokenizer.json; write one with"
                " transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        return file
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise InvalidRequest(
            f"--tokenizer {name}: no such folder, and no such tokenizer in the Hugging Face cache;"
            " give a folder that holds a tokenizer.json"
        )
    return Path(cached)


class _Counter:
    """Counts the samples of one dataset, and keeps how it was done."""

    def __init__(self, path: Path, tokenize: Tokenize, counted: Counted) -> None:
        self.path, self.tokenize = path, tokenize
        self.counted = counted
        self.has_messages = False

    def of_batches(self, batches: Iterator[Any]) -> Iterator[int]:
        compute = importlib.import_module("pyarrow.compute")
        row = 0
        for batch in batches:
            names, kind = batch.schema.names, importlib.import_module("pyarrow.types")
            if "input_ids" in names:
                column = batch.column("input_ids")
                if not (kind.is_list(column.type) or kind.is_large_list(column.type)):
                    raise InvalidRequest(f"{self.path}: input_ids must hold lists of tokens, not {column.type}")
                self.counted = "tokens"
                yield from (length or 0 for length in compute.list_value_length(column).to_pylist())
            else:
                fields = _fields_of(names) or ("length",)
                picked = batch.select([name for name in names if name in {_plain(field) for field in fields}])
                rows = ((f"{self.path}, row {row + number}", one) for number, one in enumerate(picked.to_pylist(), 1))
                yield from self.of_rows(rows)
            row += batch.num_rows

    def of_rows(self, rows: Iterator[Row]) -> Iterator[int]:
        while some := list(islice(rows, _AT_ONCE)):
            if "input_ids" in some[0][1]:
                self.counted = "tokens"
                yield from (_listed(row, place) for place, row in some)
            elif _fields_of(some[0][1]) is None and "length" in some[0][1]:
                self.counted = "tokens"
                yield from (_length(row, place) for place, row in some)
            else:
                yield from self._of_texts(some)

    def _of_texts(self, some: Sequence[Row]) -> Iterator[int]:
        texts, extra = [], []
        for place, row in some:
            text, messages = text_of(row, place)
            texts.append(text.encode("utf-8", "replace").decode())  # a lone surrogate is no text
            extra.append(messages * TEMPLATE_TOKENS if text else 0)
        self.has_messages = self.has_messages or any(extra)
        yield from (length + more for length, more in zip(self.tokenize(texts), extra, strict=True))


def text_of(row: dict[str, Any], place: str) -> tuple[str, int]:
    """A sample's text, and how many messages it is of. Raises `NoText`, and InvalidRequest for another type."""
    fields = _fields_of(row)
    if fields is None:
        known = "; ".join(" + ".join(one) for one in TEXT_FIELDS)
        raise NoText(f"{place}: has neither input_ids nor a text that is known ({known}); rename its fields")
    parts = [_part(row.get(_plain(field)), f"{place}: {_plain(field)}") for field in fields]
    return "\n".join(text for text, _ in parts if text), sum(messages for _, messages in parts)


def _part(value: Any, place: str) -> tuple[str, int]:
    """Text, or messages whose contents are joined."""
    if value is None or isinstance(value, str):
        return value or "", 0
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        contents = [_content(one.get("content", one.get("value")), place) for one in value]
        return "\n".join(contents), len(contents)
    raise InvalidRequest(f"{place} must be text or a list of messages, not {type(value).__name__}; correct it")


def _content(value: Any, place: str) -> str:
    """A message's, which may be parts with a text each."""
    if isinstance(value, list):
        return "\n".join(_content(one.get("text") if isinstance(one, dict) else one, place) for one in value)
    if value is None or isinstance(value, str):
        return value or ""
    raise InvalidRequest(f"{place}: a message's content must be text, not {type(value).__name__}; correct it")


def _fields_of(names: Iterable[str]) -> tuple[str, ...] | None:
    there = set(names)
    needed = ((fields, {field for field in fields if not field.startswith("[")}) for fields in TEXT_FIELDS)
    return next((fields for fields, all_of in needed if all_of <= there), None)


def _plain(field: str) -> str:
    return field.strip("[]")


def _listed(row: dict[str, Any], place: str) -> int:
    tokens = row.get("input_ids")
    if not isinstance(tokens, list):
        raise InvalidRequest(f"{place}: input_ids must be a list of tokens, not {type(tokens).__name__}; correct it")
    return len(tokens)


def _length(row: dict[str, Any], place: str) -> int:
    value = row.get("length")
    in_words = isinstance(value, str) and value.isdecimal() and len(value) < 20  # CSV
    number = int(str(value)) if in_words else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _LONGEST:
        raise InvalidRequest(f"{place}: length must be a number of tokens, not {value!r:.40}; correct it")
    return number
