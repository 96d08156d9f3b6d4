"""Memory sizes as people write them, to bytes and back."""

from __future__ import annotations

import re
from fractions import Fraction

from autotune.errors import InvalidRequest, UsageError

#: GiB and the bare letter are binary, GB is decimal, as in `accelerate.utils.convert_file_size_to_int`.
_UNITS = {
    "b": 1,
    **{letter: 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)},
}
_WITH_UNIT = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]+)", re.IGNORECASE | re.ASCII)
_BYTES = re.compile(r"\d{1,30}", re.ASCII)  # Python refuses to read numbers of thousands of digits


class InvalidSize(InvalidRequest, UsageError):
    """A size that cannot be read; on the command line it exits as any wrong option value does (2)."""


def parse_bytes(text: str, *, smallest: int = 1) -> int:
    """Whole bytes of "12GiB", "12G" (binary), "12 GB" (decimal), "1.5GiB", "1500MiB" or plain integer bytes.

    Raises InvalidSize for anything else, and for less than `smallest` bytes.
    """
    stripped = text.strip()
    size: Fraction | None = None
    if _BYTES.fullmatch(stripped):
        size = Fraction(stripped)
    elif (match := _WITH_UNIT.fullmatch(stripped)) and match[2].lower() in _UNITS:
        size = Fraction(match[1]) * _UNITS[match[2].lower()]
    if size is None or size < smallest:
        raise InvalidSize(
            f'"{text[:60]}" is not a memory size: write it like 12GiB, 1500MiB, 1.5GiB, 12G (binary), '
            f"12GB (decimal) or as whole bytes{', above 0' if smallest else ''}"
        )
    return int(size)


def format_bytes(size: int | None) -> str:
    """ "11.8 GiB", or "unknown"."""
    if size is None:
        return "unknown"
    import humanize

    return humanize.naturalsize(size, binary=True, format="%.1f")
