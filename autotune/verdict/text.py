"""What a log says about why its run died. Pure: text in, judgement out."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from autotune.values import Judgement, Verdict
from autotune.verdict.actions import action_for, remarks, settle_for
from autotune.verdict.numbers import read_numbers
from autotune.verdict.rules import (
    ASIDE,
    CAUSES,
    EXCEPTION_LINE,
    HANDLED,
    JOINER,
    MEMORY,
    PHRASE,
    PHRASE_DEVICE,
    PHRASE_ERROR,
    PHRASE_HOST,
    PINNING,
    RULES,
    SOURCE_LINE,
    TRACEBACK,
    Kind,
    Rule,
)

HEAD_CHARS = 16 * 1024
TAIL_CHARS = 128 * 1024  # the end decides; eight ranks' tracebacks take half of it
_QUOTE_CHARS = 200
_MESSAGE_CHARS = 1500  # how far a message's numbers may stand behind the words that a rule knows
_NEAR_LINES = 80  # a Python exception this soon after a native library's message is its consequence
_WENT_ON_LINES = 10  # of output after an error that was not the end

_SIGKILL = frozenset({-9, 137})
_SIGBUS = frozenset({-7, 135})
_STOPPED = frozenset({-2, -15, 130, 143})
_CRASH = {-4: "SIGILL", -6: "SIGABRT", -8: "SIGFPE", -11: "SIGSEGV", 132: "SIGILL", 134: "SIGABRT", 139: "SIGSEGV"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that matched, and where."""

    rule: Rule
    start: int
    end: int
    line: int
    block: int  # tracebacks that belong together are one block
    quote: str
    handled: bool = False  # the program itself went on from it

    @property
    def kind(self) -> Kind:
        return self.rule.kind

    @property
    def evidence(self) -> str:
        return f'{self.rule.name}: "{self.quote}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What a text comes down to. `chosen` is None where it holds nothing that any rule knows."""

    chosen: Finding | None
    verdict: Verdict | None
    earlier: Finding | None  # a lack of memory that was not the end
    lines_after: int  # of output after the chosen finding
    is_empty: bool
    numbers: dict[str, int]


def classify_text(
    text: str, *, exit_code: int | None = None, target: Literal["cuda", "cpu"] | None = None
) -> Judgement:
    """Judge a log of any length. Of a long one its first 16 Ki and last 128 Ki characters are read.

    `exit_code` is the process's: negative or above 128 for a signal. With target "cpu" the run's device is the CPU,
    so a failed allocation of the process itself is `device_oom`.
    """
    found = diagnose(text)
    judgement = _with_exit_code(judgement_of(found), found, exit_code)
    if target == "cpu" and judgement.verdict is Verdict.HOST_OOM and _is_allocation(found):
        return replace(
            judgement,
            verdict=Verdict.DEVICE_OOM,
            evidence=(*judgement.evidence, "the run's device is the CPU, so its own allocations are device memory"),
            action=action_for(Verdict.DEVICE_OOM, None),
        )
    return judgement


def diagnose(text: str) -> Diagnosis:
    """Find what decides, without judging the exit code."""
    view = _View(text)
    findings = list(_findings(view))
    chosen, verdict = _decide(findings, view)
    earlier = None
    numbers: dict[str, int] = {}
    if chosen is not None:
        if verdict not in (Verdict.DEVICE_OOM, Verdict.HOST_OOM):
            earlier = next((item for item in reversed(findings) if item.kind in MEMORY and item is not chosen), None)
        if chosen.kind in CAUSES:
            numbers = read_numbers(view.text[view.starts[chosen.line] : chosen.end + _MESSAGE_CHARS])
    return Diagnosis(
        chosen=chosen,
        verdict=verdict,
        earlier=earlier,
        lines_after=view.lines_after(chosen.end) if chosen else 0,
        is_empty=not text.strip(),
        numbers=numbers,
    )


class _View:
    """The part of a text that is read, lower-cased, with its lines and its chains of tracebacks."""

    def __init__(self, text: str) -> None:
        if len(text) > HEAD_CHARS + TAIL_CHARS:
            text = f"{text[:HEAD_CHARS]}\n…\n{text[-TAIL_CHARS:]}"
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n").replace("\r", "\n")
        lower = text.lower()
        if len(lower) != len(text):  # a few letters grow when lower-cased; offsets must not
            lower = "".join(letter.lower() if len(letter.lower()) == 1 else "?" for letter in text)
        self.original, self.unmasked = text, lower
        lower = self.text = SOURCE_LINE.sub(_blank, lower)
        self.starts = [0, *(match.end() for match in re.finditer("\n", lower))]
        self.joined = [self.line(match.start()) for match in JOINER.finditer(lower)]
        tracebacks = [self.line(match.start()) for match in TRACEBACK.finditer(lower)]
        #: Lines where an unrelated traceback begins.
        self.cuts = [line for line in tracebacks if not self._is_near(self.joined, line, before=4)]
        asides = [self.line(match.start()) for match in ASIDE.finditer(lower)]
        self.aside_blocks = {self.block(cut) for cut in self.cuts if self._is_near(asides, cut, before=2)}
        self.chained = {self.block(line) for line in self.joined}

    @staticmethod
    def _is_near(lines: list[int], line: int, *, before: int) -> bool:
        place = bisect.bisect_right(lines, line)
        return place > 0 and lines[place - 1] >= line - before

    def line(self, offset: int) -> int:
        return bisect.bisect_right(self.starts, offset) - 1

    def block(self, line: int) -> int:
        return bisect.bisect_right(self.cuts, line)

    def span(self, line: int) -> tuple[int, int]:
        end = self.starts[line + 1] - 1 if line + 1 < len(self.starts) else len(self.text)
        return self.starts[line], end

    def quote(self, start: int, end: int) -> str:
        """The matched words with the line around them, on one line and trimmed."""
        first, last = self.span(self.line(start))[0], self.span(self.line(max(start, end - 1)))[1]
        if start - first > _QUOTE_CHARS // 2:
            first = start - _QUOTE_CHARS // 4
        words = " ".join(self.original[first : min(last, first + 4 * _QUOTE_CHARS)].split())
        return words if len(words) <= _QUOTE_CHARS else words[: _QUOTE_CHARS - 1] + "…"

    def lines_after(self, end: int) -> int:
        return sum(1 for line in self.text[end:].splitlines()[1:] if line.strip())


def _blank(match: re.Match[str]) -> str:
    """The match with the part that is only quoted turned to spaces."""
    quoted = "source" if match["source"] is not None else "box"
    kept = match.start(quoted) - match.start()
    return match[0][:kept] + " " * (len(match[0]) - kept)


def _findings(view: _View) -> Iterator[Finding]:
    """Every match, in the order of the text. A line belongs to the first rule of the table that matches it."""
    claimed: set[int] = set()
    found: list[Finding] = []

    def take(rule: Rule, start: int, end: int) -> None:
        while start < end and view.text[start].isspace():
            start += 1
        first, last = view.line(start), view.line(max(start, end - 1))
        if claimed.isdisjoint(range(first, last + 1)):
            claimed.update(range(first, last + 1))
            quote = view.quote(start, end)
            found.append(Finding(rule=rule, start=start, end=end, line=first, block=view.block(first), quote=quote))

    for rule in RULES:
        for match in rule.pattern.finditer(view.text):
            take(rule, *match.span())
    for match in PHRASE.finditer(view.text):
        if view.line(match.start()) in claimed:
            continue
        first, last = view.span(view.line(match.start()))
        first = max(first, match.start() - 400)
        take(_loose_rule(view.text[first : match.end()], view.text[match.end() : last][:400]), *match.span())
    for match in EXCEPTION_LINE.pattern.finditer(view.text):
        take(EXCEPTION_LINE, *match.span())
    handled = [match.span() for match in HANDLED.pattern.finditer(view.text)]
    last = max((view.line(end - 1) for _, end in handled), default=-1)
    found = [replace(item, handled=item.line <= last and item.kind in MEMORY | {Kind.LIBRARY}) for item in found]
    for start, end in handled:
        first = view.line(start)
        quote = view.quote(start, end)
        found.append(Finding(rule=HANDLED, start=start, end=end, line=first, block=view.block(first), quote=quote))
    yield from sorted(found, key=lambda item: item.start)


def _loose_rule(so_far: str, rest: str) -> Rule:
    """What a line means that says in words of no rule that memory ran out. No error up to there: talk."""
    line = so_far + rest
    if not PHRASE_ERROR.search(so_far):
        return Rule(Kind.TALK, "only talks about memory", PHRASE, Verdict.NOT_OOM)
    of_host, of_device = PHRASE_HOST.search(line), PHRASE_DEVICE.search(line)
    if of_device and not of_host:
        return Rule(Kind.DEVICE, "out of device memory", PHRASE, Verdict.DEVICE_OOM)
    if of_host and not of_device:
        return Rule(Kind.ALLOCATION, "out of host memory", PHRASE, Verdict.HOST_OOM)
    return Rule(Kind.LIBRARY, "out of memory, whose is not said", PHRASE, Verdict.AMBIGUOUS)


def _decide(findings: list[Finding], view: _View) -> tuple[Finding | None, Verdict | None]:
    """The finding that explains the end, and its verdict: the last cause, or the root of its chain."""
    causes = [item for item in findings if item.kind in CAUSES and not item.handled]
    asides = [item for item in causes if item.kind is Kind.ERROR and item.block in view.aside_blocks]
    causes = [item for item in causes if item not in asides]
    if causes:
        chosen = _root([item for item in causes if item.block == causes[-1].block], view)
        if chosen.kind is Kind.ERROR:
            chosen = _behind(chosen, findings, causes)
        if chosen.rule.verdict is Verdict.AMBIGUOUS:
            plain = [item for item in causes if item.kind is not Kind.ERROR and item.rule.verdict != Verdict.AMBIGUOUS]
            chosen = plain[-1] if plain else chosen
        return chosen, _verdict_of(chosen, view)
    for kinds in ({Kind.KILL}, {Kind.WRAPPER, Kind.FOLLOW}, {Kind.ERROR}, {Kind.HANDLED}, {Kind.TALK}):
        matching = [item for item in (asides if Kind.ERROR in kinds else findings) if item.kind in kinds]
        if matching:
            return _unwrapped(matching[-1], findings)
    return None, None


def _root(block: list[Finding], view: _View) -> Finding:
    """Of a chain of exceptions the first lack of memory, else the last specific cause; without a chain the last."""
    if block[-1].block not in view.chained:
        return block[-1]
    memory = [item for item in block if item.kind in MEMORY]
    specific = [item for item in block if item.kind is not Kind.ERROR]
    return memory[0] if memory else (specific or block)[-1]


def _behind(error: Finding, findings: list[Finding], causes: list[Finding]) -> Finding:
    """What an exception of no known family came from: native code's message shortly before, or a kill after it."""
    printed = [item for item in causes if item.kind is Kind.PRINTED and 0 <= error.line - item.line <= _NEAR_LINES]
    killed = [item for item in findings if item.kind is Kind.KILL and item.start > error.start]
    return (killed or printed or [error])[-1]


def _verdict_of(chosen: Finding, view: _View) -> Verdict:
    """The rule's verdict, but a bare CUDA error while host memory is pinned may be the host's."""
    if chosen.kind is Kind.BARE and PINNING.search(view.unmasked, max(0, chosen.start - 1500), chosen.start):
        return Verdict.AMBIGUOUS
    return chosen.rule.verdict


def _unwrapped(chosen: Finding, findings: list[Finding]) -> tuple[Finding, Verdict]:
    """A search that gave up after errors it had caught died of the last of them."""
    caught = [item for item in findings if item.handled and item.start < chosen.start]
    if chosen.kind is Kind.WRAPPER and caught:
        return caught[-1], caught[-1].rule.verdict
    return chosen, chosen.rule.verdict


def judgement_of(found: Diagnosis) -> Judgement:
    chosen, verdict = found.chosen, found.verdict
    if chosen is None or verdict is None:
        if found.is_empty:
            return _ambiguous(("the log is empty",), None)
        return Judgement(
            verdict=Verdict.NOT_OOM,
            evidence=("nothing in the text is an error about memory",),
            action="Look for the error elsewhere; nothing here says that memory ran out.",
        )
    evidence = [chosen.evidence]
    action = action_for(verdict, chosen.kind)
    if verdict is Verdict.DEVICE_OOM:
        more, better = remarks(found.numbers)
        evidence += more
        action = better or action
    if found.earlier is not None:
        evidence.append(f"not the end of it, but earlier: {found.earlier.evidence}")
    settle = settle_for(chosen.kind) if verdict is Verdict.AMBIGUOUS else None
    return Judgement(verdict=verdict, evidence=tuple(evidence), action=action, numbers=found.numbers, settle=settle)


def _ambiguous(evidence: tuple[str, ...], kind: Kind | None) -> Judgement:
    return Judgement(
        verdict=Verdict.AMBIGUOUS,
        evidence=evidence,
        action=action_for(Verdict.AMBIGUOUS, kind),
        settle=settle_for(kind),
    )


def _with_exit_code(judgement: Judgement, found: Diagnosis, exit_code: int | None) -> Judgement:
    """Weigh the text against how the process ended."""
    if exit_code is None:
        return judgement
    evidence = (*(() if found.is_empty else judgement.evidence), f"exit code {exit_code}")
    kind = found.chosen.kind if found.chosen else None
    is_cause = kind in CAUSES and kind is not Kind.ERROR
    if exit_code == 0:
        if is_cause and found.lines_after < _WENT_ON_LINES:
            return replace(judgement, evidence=evidence)
        return Judgement(verdict=Verdict.NOT_OOM, evidence=evidence, action="Nothing: the run ended well.")
    if is_cause or kind in (Kind.KILL, Kind.WRAPPER):
        return replace(judgement, evidence=evidence)
    if exit_code in _SIGKILL:
        return _ambiguous((*evidence, "ended by SIGKILL, by whom is not said"), Kind.KILL)
    if exit_code in _STOPPED:
        return Judgement(verdict=Verdict.INTERRUPTED, evidence=evidence, action=action_for(Verdict.INTERRUPTED, None))
    if exit_code in _SIGBUS:
        return _ambiguous((*evidence, "ended by SIGBUS: a full /dev/shm, or a bug"), Kind.KILL)
    if exit_code in _CRASH and kind is not Kind.FOLLOW:
        return Judgement(
            verdict=Verdict.NOT_OOM,
            evidence=(*evidence, f"ended by {_CRASH[exit_code]}, a crash in native code"),
            action=action_for(Verdict.NOT_OOM, None),
        )
    if kind in (None, Kind.TALK, Kind.HANDLED):
        return _ambiguous((*evidence, "no error in the text explains it"), None)
    return replace(judgement, evidence=evidence)


def _is_allocation(found: Diagnosis) -> bool:
    return found.chosen is not None and found.chosen.kind is Kind.ALLOCATION
