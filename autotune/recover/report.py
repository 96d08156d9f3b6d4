"""A run's incidents for a person: what died, the evidence, what was changed, what it cost, what was lost. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from autotune.recover.facts import Action, Incident
from autotune.recover.plan import RunState
from autotune.recover.private import masked, without_secrets
from autotune.recover.words import batch_in_words, change_in_words
from autotune.verdict.actions import gib

_DONE = {
    Action.STEP_DOWN: "stepped down",
    Action.SMALLER_EVALUATION: "made the evaluation batch smaller",
    Action.SPARE_HOST: "spared system RAM",
    Action.SAME_AGAIN: "ran the same again",
    Action.WAIT: "waited for memory",
    Action.STOP: "stopped",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # what could move a terminal's cursor or end a line


def report_text(state: RunState) -> str:
    """The run as Markdown (`report.md`): its end, a line an attempt, then each incident. Secrets are masked."""
    lines = [
        f"# Run {state.run_id}",
        "",
        f"- command: {_code(shlex.join(masked(state.argv)))}",
        f"- {_outcome(state)}",
        f"- {_cost(state.incidents)}",
    ]
    if state.changed:
        lines.append(f"- now runs with: {change_in_words(state.changed)}")
    if state.incidents:
        lines += ["", "## Attempts", "", *_table(state)]
    for incident in state.incidents:
        lines += ["", *_section(incident)]
    return str(without_secrets("\n".join(lines))) + "\n"


def incident_line(incident: Incident) -> str:
    """One line: where, what of, and what was done: "step 137: device_oom in train; stepped down: micro batch 2"."""
    step = f"step {incident.step:,}: " if incident.step is not None else ""
    change = f": {change_in_words(incident.decision.change)}" if incident.decision.change else ""
    done = _DONE.get(incident.decision.action, incident.decision.action.value)
    return _plain(f"{step}{incident.judgement.verdict} in {incident.phase}; {done}{change}")


def _outcome(state: RunState) -> str:
    attempts = f"{state.attempts} attempt{'s' if state.attempts != 1 else ''}"
    if state.finished and state.exit_code == 0:
        return f"finished well, in {attempts}"
    if state.exit_code is not None:
        return f"ended with exit code {state.exit_code}, after {attempts}"
    return f"goes on, in attempt {state.attempts}"


def _cost(incidents: tuple[Incident, ...]) -> str:
    """What all of them cost together; what is not known is said to be."""
    recovered = [one for one in incidents if one.decision.action is not Action.STOP]
    steps = sum(one.steps_lost or 0 for one in recovered)
    seconds = sum(one.seconds_lost or 0.0 for one in recovered)
    unknown = sum(one.steps_lost is None for one in recovered)
    words = f"{len(incidents)} incident{'s' if len(incidents) != 1 else ''}, {len(recovered)} recovered;"
    words += f" {steps:,} finished steps done again{_time(seconds)}"
    return words + (f" (not known of {unknown})" if unknown else "")


def _table(state: RunState) -> Iterator[str]:
    yield "| attempt | ended (UTC) | last step | died of | then | steps done again |"
    yield "|---|---|---|---|---|---|"
    for one in state.incidents:
        lost = "" if one.decision.action is Action.STOP else _number(one.steps_lost)
        what = f"{one.judgement.verdict} in {one.phase}"
        yield f"| {one.attempt} | {_plain(one.time_utc)} | {_number(one.step)} | {what} | {_then(one)} | {lost} |"
    if state.finished and state.exit_code == 0:
        yield f"| {state.attempts} | | | finished well | | |"


def _then(one: Incident) -> str:
    done = _DONE.get(one.decision.action, one.decision.action.value)
    return f"{done}: {_cell(change_in_words(one.decision.change))}" if one.decision.change else done


def _section(one: Incident) -> Iterator[str]:
    """One incident in full."""
    yield f"## Incident {one.number}: {one.judgement.verdict} in {one.phase}"
    yield ""
    yield f"- attempt {one.attempt}, {_plain(one.time_utc)}, {_end(one)}"
    at = f"; it was at a batch of {batch_in_words(one.batch)}" if one.batch else ""
    yield f"- last finished step: {_number(one.step)}{at}"
    if one.message:
        yield f"- its last words: {_code(one.message)}"
    yield "- evidence:"
    yield from (f"  - {_code(line)}" for line in one.judgement.evidence or ("none",))
    if one.judgement.numbers:
        sizes = (
            f"{name.removesuffix('_bytes').replace('_', ' ')} {gib(n)}" for name, n in one.judgement.numbers.items()
        )
        yield f"- numbers: {', '.join(sizes)}"
    if one.judgement.settle:
        yield f"- what would settle it: {_said(one.judgement.settle)}"
    yield f"- decision: {_said(one.decision.why)}"
    yield f"- changed: {change_in_words(one.decision.change) or 'nothing'}"
    yield f"- cost: {_lost(one)}"


def _end(one: Incident) -> str:
    by = "" if one.ended_by.value == "itself" else f", ended by us ({one.ended_by.value.replace('_', ' ')})"
    if one.ended_by.value == "user":
        by = ", ended by the user"
    if one.signal is not None:
        return f"signal {one.signal}{by}"
    return f"exit code {one.exit_code}{by}" if one.exit_code is not None else f"could not be started{by}"


def _lost(one: Incident) -> str:
    if one.decision.action is Action.STOP:
        return "the run stopped here; what its checkpoints hold is kept"
    start = (
        f"resumed from {_code(one.resumed_from)}" if one.resumed_from else "began again from the start: no checkpoint"
    )
    if one.steps_lost is None:
        return f"{start}; how many steps are done again is not known"
    if one.steps_lost == 0:
        return f"{start}; no step was lost"
    plural = "s" if one.steps_lost != 1 else ""
    return f"{start}; {one.steps_lost:,} step{plural} after it done again{_time(one.seconds_lost or 0.0)}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f", {seconds / 60:,.0f} min of training" if seconds >= 120 else f", {seconds:,.0f} s of training"


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _plain(text: str) -> str:
    return _CONTROL.sub(" ", text).strip()


def _said(text: str) -> str:
    """A sentence with words of others in it: none of them may become Markdown or HTML."""
    return re.sub(r"([\\`*_<\[\]|#])", r"\\\1", _plain(text))


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _code(text: str) -> str:
    """As code, fenced by more backticks than it holds, so that nothing in it is Markdown."""
    text = _plain(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
