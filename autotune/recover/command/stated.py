"""A value as the user wrote it, with where it stands, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.errors import InvalidRequest

_TRUE = ("true", "yes", "t", "y", "1", "on")
_FALSE = ("false", "no", "f", "n", "0", "off")
_NONE = ("", "none", "null", "~")
_LONGEST = 40  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Stated:
    """`value` is text on a command line, and what YAML or JSON made of it in a file."""

    value: Any
    where: str  # "--max_length", "x.yaml: max_length"


#: What is stated, by the trainer's own name for it.
Raw = Mapping[str, Stated]


def plain(raw: Raw, key: str) -> Any:
    """The value, None where it is not stated, is null, or is only known to the trainer (`${VARIABLE}`)."""
    value = raw[key].value if key in raw else None
    if isinstance(value, str) and (value.strip().lower() in _NONE or "${" in value):
        return None
    return value


def is_truth(word: str) -> bool:
    return word.lower() in (*_TRUE, *_FALSE)


def whole(raw: Raw, key: str, least: int) -> int | None:
    """Raises InvalidRequest where it is no whole number of at least `least`."""
    value = plain(raw, key)
    if value is None:
        return None
    number = _whole(value)
    if number is None or number < least:
        raise _wrong(raw, key, f"a whole number of at least {least}")
    return number


def number(raw: Raw, key: str) -> float | None:
    """Raises InvalidRequest where it is no number. A whole one stays an int."""
    value = plain(raw, key)
    if value is None:
        return None
    if (exact := _whole(value)) is not None:
        return exact
    try:
        return float("x" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise _wrong(raw, key, "a number") from None


def truth(raw: Raw, key: str) -> bool | None:
    """Raises InvalidRequest where it is neither true nor false."""
    value = plain(raw, key)
    if value is None or isinstance(value, bool):
        return value
    word = str(value).lower()
    if not is_truth(word):
        raise _wrong(raw, key, "true or false")
    return word in _TRUE


def is_on(raw: Raw, key: str) -> bool:
    """Whether it is stated and not off; words such as auto and offload are on."""
    value = plain(raw, key)
    return value is not None and str(value).lower() not in _FALSE


def text(raw: Raw, key: str) -> str | None:
    value = plain(raw, key)
    return None if value is None else str(value)


def names(raw: Raw, key: str) -> tuple[str, ...] | None:
    """Names of a list, or of text with commas or spaces between."""
    value = plain(raw, key)
    if value is None:
        return None
    parts = value if isinstance(value, list) else str(value).replace(",", " ").split()
    return tuple(str(part) for part in parts) or None


def quoted(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    shown = str(value)
    return repr(shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…")


def _whole(value: Any) -> int | None:
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, str):
        digits = value.strip()
        return int(digits) if digits.lstrip("+-").isdecimal() and len(digits) < 20 else None
    return None


def _wrong(raw: Raw, key: str, wanted: str) -> InvalidRequest:
    if raw[key].where.startswith("--") and raw[key].value is True:
        return InvalidRequest(f"{raw[key].where} has no value: give it {wanted}")
    return InvalidRequest(f"{raw[key].where} is {quoted(raw[key].value)}, not {wanted}: correct it")
