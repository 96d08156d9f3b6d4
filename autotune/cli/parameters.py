"""What options take: checked while the command line is read, so that a wrong value costs nothing and exits 2."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Text(click.types.StringParamType):
    """Any text with something in it: an empty shell variable is not a value left out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty; give a value, or leave the option out", param, ctx)
        if value == "--":
            self.fail("its value is missing before --", param, ctx)
        return str(value)


class File(click.types.Path):
    """A path; `--` is no path that was meant, but the mark behind an option that has none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(Text().convert(value, param, ctx))


class Whole(click.types.IntParamType):
    """A whole number within bounds."""

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = smallest, largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:  # no number, or one of thousands of digits
            number = self.smallest - 1
        if not self.smallest <= number <= self.largest:
            bound = f"{self.smallest} or more" if number < self.smallest else f"{self.largest} at most"
            self.fail(f"give a whole number, {bound}, not {str(value)[:40]}", param, ctx)
        return number


class Number(click.types.FloatParamType):
    """A number of which `accepts` is true; `wanted` says which these are. `percent`: 1% is 0.01."""

    def __init__(self, wanted: str, accepts: Callable[[float], bool], *, percent: bool = False) -> None:
        self.wanted, self.accepts, self.percent = wanted, accepts, percent

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        of_hundred = self.percent and text.endswith("%")
        try:
            number = float(text.removesuffix("%")) / 100 if of_hundred else float(text)
        except ValueError:
            number = float("nan")
        if not self.accepts(number):  # of nan nothing is true
            self.fail(f"give {self.wanted}, not {str(value)[:40]}", param, ctx)
        return number


_UNITS_S = {"": 1.0, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_LONGEST_S = 30 * 24 * 3600.0


class Duration(click.types.FloatParamType):
    """Seconds, written like 90s, 5min, 1.5h or 90."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _DURATION.fullmatch(str(value).strip())
        unit = _UNITS_S.get(match[2].lower()) if match else None
        seconds = float(match[1]) * unit if match and unit else 0.0
        if not 0 < seconds <= _LONGEST_S:
            self.fail(f"write it like 90s, 5min or 1h, above 0 and up to 30 days, not {str(value)[:40]}", param, ctx)
        return seconds
