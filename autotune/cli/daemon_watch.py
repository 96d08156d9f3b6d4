"""`daemon status --watch`: the same document, drawn anew each second."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autotune.cli import daemon_status as text
from autotune.recover.job import LIVE, State

_EVERY_S = 1.0
_COLOURS = {
    State.RUNNING: "green",
    State.FITTING: "cyan",
    State.RECOVERING: "yellow",
    State.WAITING: "yellow",
    State.INTERRUPTED: "yellow",
    State.FAILED: "bold red",
    State.FINISHED: "dim green",
    State.CANCELLED: "dim",
}


def watch() -> None:
    """Until Ctrl-C, which is how it is left: exit code 0. A pipe gets one picture and no more."""
    console = Console()
    if not console.is_terminal:
        console.print(picture(text.read(), height=1000))
        return
    left = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        left.set()

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not left.is_set():
                live.update(picture(text.read(), height=console.height), refresh=True)
                left.wait(_EVERY_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def picture(document: dict[str, Any], *, height: int) -> RenderableType:
    """Headline, jobs, incidents; of the jobs as many as `height` lines hold."""
    incidents = [text.incident_line(incident) for incident in document["incidents"][-5:]]
    jobs, left_out = text.listed(document)
    room = max(3, height - len(incidents) - 6)
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("ID", "State", "Name", "On", "Progress", "", "Left", "Tokens/s", "Memory", "Incidents"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", ratio=2 if heading == "Progress" else None)
    for job in jobs[:room]:
        table.add_row(*_row(job))
    hidden = left_out + max(0, len(jobs) - room)
    more = [Text(f"… and {hidden} more", style="dim")] if hidden else []
    return Group(
        Text(text.headline(document), style="bold"),
        Text(""),
        table,
        *more,
        Text(""),
        *(Text(line, style="yellow", overflow="ellipsis", no_wrap=True) for line in incidents),
        Text(f"{document['time_utc'][11:19]} UTC, Ctrl-C leaves", style="dim"),
    )


def _row(job: dict[str, Any]) -> list[RenderableType]:
    state = State(job["state"])
    bar: RenderableType
    if job["fraction"] is not None and state in LIVE:
        bar = ProgressBar(total=1.0, completed=job["fraction"])
    else:
        bar = Text(text.word_text(job), style="dim", overflow="ellipsis", no_wrap=True)
    return [
        Text(str(job["id"])),
        Text(text.state_text(job), style=_COLOURS.get(state, "")),
        Text(job["name"] or " ".join(job["command"])[:30]),
        Text(job["device"] or job["gpu"]),
        bar,
        Text(text.steps_text(job)),
        Text(text.duration_text(job["seconds_left"])),
        Text(f"{job['tokens_per_second']:,.0f}" if job["tokens_per_second"] else "-"),
        Text(text.memory_text(job)),
        Text(str(job["incidents"] or "-")),
    ]
