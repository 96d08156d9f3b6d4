"""What a supervised run tells on stderr, a line each, apart from the command's own output."""

from __future__ import annotations

import contextlib
import shlex

import click

from autotune.recover.facts import Action, Checkpoint, Ended, EndedBy, Incident, Launch, Settings
from autotune.recover.plan import RunState

PREFIX = "autotune: "


def tell(line: str) -> None:
    """A line of the supervisor's own. A terminal that is gone or a full disk behind it never ends the run."""
    with contextlib.suppress(OSError):
        click.echo(PREFIX + " ".join(line.split()), err=True)


def attempt_lines(number: int, launch: Launch, resume: Checkpoint | None, settings: Settings) -> list[str]:
    """What an attempt runs with, and what of it is ours."""
    lines = []
    if number > 1 or resume is not None:
        where = f"from {resume.path} (step {resume.step:,})" if resume else "from the start: there is no checkpoint yet"
        lines.append(f"attempt {number} begins {where}")
    lines += [f"  {line}" for line in launch.shown]
    return lines or [f"supervising, {batch_words(settings)}"]


def batch_words(settings: Settings) -> str:
    """ "micro batch 8 × 1, checkpoints every 500 steps in out"."""
    micro, steps = settings.micro_batch_size, settings.gradient_accumulation_steps
    parts = [
        f"micro batch {micro} × {steps or 1}" if micro is not None else "its config is seen once its trainer is up"
    ]
    if settings.save_strategy == "steps" and settings.save_steps:
        parts.append(f"checkpoints every {settings.save_steps:g} steps")
    elif settings.save_strategy not in (None, "no"):
        parts.append(f"checkpoints by {settings.save_strategy}")
    if settings.output_dir:
        parts.append(f"in {settings.output_dir}")
    return ", ".join(parts)


def incident_lines(incident: Incident) -> list[str]:
    lines = [incident.decision.why]
    if incident.ended_by is EndedBy.USER:
        return lines
    said = [one for one in incident.judgement.evidence if not one.startswith("in phase ")]  # the reason names it
    lines += [f"  evidence: {one}" for one in said[:2]]
    if incident.decision.action is Action.STOP:
        return lines
    if incident.resumed_from is None:
        if incident.steps_lost:
            lines.append(f"  no complete checkpoint: {_again(incident)}")
    elif incident.steps_lost:
        lines.append(f"  {_again(incident)}")
    else:
        lines.append("  no step is lost")
    return lines


def _again(incident: Incident) -> str:
    """ "12 steps are done again, 30 s of training"."""
    steps, seconds = incident.steps_lost or 0, incident.seconds_lost or 0.0
    what = f"{counted(steps, 'finished step')} {'is' if steps == 1 else 'are'} done again"
    return f"{what}, {seconds:,.0f} s of training" if seconds >= 1 else what


def counted(number: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def end_line(state: RunState, ended: Ended, report: str | None, *, is_job: bool = False) -> str:
    """How it ended; a plain success without incidents says nothing more than that."""
    step = ended.progress.step
    steps = f" at step {step:,}" if step is not None else ""
    if ended.ended_by is EndedBy.USER:
        later = "" if is_job else "; the same command with --resume goes on"
        return f"stopped{steps} with exit code {state.exit_code}{later}"
    if state.exit_code == 0:
        times = len(state.incidents)
        often = f" after {times} recovered incident{'s' if times > 1 else ''}" if times else ""
        return f"finished{steps}{often}{f'; report: {report}' if report and times else ''}"
    return f"ended with exit code {state.exit_code}{steps}{f'; report: {report}' if report else ''}"


def command_line(words: tuple[str, ...]) -> str:
    return shlex.join(words)
