"""`autotune doctor`: what works here, what is missing, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from autotune.hardware.checks import Check

SCHEMA = "autotune.doctor/1"
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option(
    "--python",
    metavar="PATH",
    help="Look at this interpreter's environment (your trainer's).  [default: the one autotune runs in]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def command(context: click.Context, python: str | None, as_json: bool) -> None:
    """Check Python, packages, driver, torch, bitsandbytes, disk and GPUs.

    Takes some seconds (it starts torch in a process of its own). Exits 1 if a check failed; warnings do not count.

    \b
    Example:
      autotune doctor
      autotune doctor --python ~/trainer/.venv/bin/python
    """
    from autotune.hardware.checks import run_checks

    checks = run_checks(python)
    done = list(checks) if as_json else _show(checks)
    failed = any(check.status == "fail" for check in done)
    if as_json:
        click.echo(json.dumps(document(done), indent=2))
    context.exit(1 if failed else 0)


def document(checks: Iterable[Check]) -> dict[str, object]:
    items = [
        {"name": check.name, "status": check.status.value, "message": check.message, "next_step": check.next_step}
        for check in checks
    ]
    return {"schema": SCHEMA, "ok": all(item["status"] != "fail" for item in items), "checks": items}


def _show(checks: Iterable[Check]) -> list[Check]:
    """Print each check as it is done."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    done: list[Check] = []
    for check in checks:
        done.append(check)
        status = Text(f"{check.status.value:<5}", style=_COLOURS[check.status.value])
        console.print(status + Text(f"{check.name}: {check.message}"), soft_wrap=True)
        if check.next_step:
            console.print(f"     → {check.next_step}", markup=False, highlight=False, soft_wrap=True)
    return done
