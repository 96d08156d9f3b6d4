from __future__ import annotations

import click
import pytest

from autotune.cli.fit import TOLERANCE
from autotune.cli.parameters import Duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("90", 90),
        ("5min", 300),
        ("5 MIN", 300),
        ("2m", 120),
        ("1.5h", 5400),
        ("0.5s", 0.5),
        ("720h", 2592000),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "0", "0min", "-1s", "1e3", "1:30", "721h", "5 5s", "nan", "٣s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="90s, 5min or 1h"):
        Duration().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "fraction"), [("0.01", 0.01), ("1%", 0.01), ("2.5 %", 0.025), ("0", 0.0), ("50%", 0.5)]
)
def test_a_tolerance_is_a_fraction_or_a_percentage(text: str, fraction: float) -> None:
    assert TOLERANCE.convert(text, None, None) == pytest.approx(fraction)


@pytest.mark.parametrize("text", ["51%", "1%%", "%", "nan", "-0.1", "1 of 100"])
def test_what_is_no_tolerance_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="or 1%"):
        TOLERANCE.convert(text, None, None)
