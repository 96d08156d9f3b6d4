"""What options take: checked while the command line is read, so that a wrong value costs nothing and exits 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


class Text(click.types.StringParamType):
    """Any text with something in it: an empty shell variable is not a value left out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty; give a value, or leave the option out", param, ctx)
        return str(value)


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
    """A number of which `accepts` is true; `wanted` says which these are."""

    def __init__(self, wanted: str, accepts: Callable[[float], bool]) -> None:
        self.wanted, self.accepts = wanted, accepts

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not self.accepts(number):  # of nan nothing is true
            self.fail(f"give {self.wanted}, not {str(value)[:40]}", param, ctx)
        return number
