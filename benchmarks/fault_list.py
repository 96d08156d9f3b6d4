"""The cases of the fault table: which faults strike which run where, from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.fault_inject import FROM_OUTSIDE, MIB, Fault, Law, Spec, Strike
from benchmarks.fault_ledger import Task

LIMIT_BYTES = 640 * MIB  # of the stand-in's data, enforced by the system
REAL_LIMIT_BYTES = 8192 * MIB  # of a real trainer's: what it takes beyond its libraries is never touched
_FIXED_BYTES = 64 * MIB
_PYTHON_BYTES = 48 * MIB  # that the interpreter may take of the limit
_TORCH_BYTES = 2560 * MIB  # … with torch, transformers and peft
EFFECTIVE_BATCH = 8
REAL_STEPS = 16
_STEPS, _SAVE = 24, 4


@dataclass(frozen=True)
class Outside:
    """A fault that the harness brings about: so long after a trainer has finished `step` (0: after the start)."""

    fault: Fault
    step: int
    delay_s: float


@dataclass(frozen=True)
class Case:
    """One run, and what happens to it."""

    number: int
    kind: Fault
    real: bool = False  # transformers' Trainer; otherwise the stand-in
    daemon: bool = False  # as a job of the daemon; otherwise under `autotune run`
    micro: int = 4
    accumulation: int = 2
    evaluation: int = 8
    eval_steps: int = 0
    max_steps: int = _STEPS
    save_steps: int = _SAVE
    workers: int = 0
    save_total_limit: int | None = None
    spec: Spec = field(default_factory=lambda: Spec(folder=""))
    outside: tuple[Outside, ...] = ()

    @property
    def task(self) -> Task:
        return Task(self.spec.samples, self.max_steps, self.micro * self.accumulation, self.spec.seed)

    @property
    def limit_bytes(self) -> int:
        return REAL_LIMIT_BYTES if self.real else LIMIT_BYTES

    def spec_in(self, folder: Path) -> Spec:
        return replace(self.spec, folder=str(folder))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cases(seed: int, count: int, real: int) -> Iterator[Case]:
    """`count` cases, `real` of them on a real Trainer, the kinds in turn."""
    for number in range(count):
        is_real = number >= count - real
        kinds = _REAL_KINDS if is_real else _KINDS
        kind = kinds[(number - (count - real) if is_real else number) % len(kinds)]
        chance = random.Random(f"{seed} {number}")
        yield make(number, kind, chance, real=is_real)


def make(number: int, kind: Fault, chance: random.Random, *, real: bool = False) -> Case:
    """A case of this kind with everything else drawn."""
    micro = chance.choice((2, 4, 8))
    daemon = kind in (Fault.KILL_DAEMON, Fault.KILL_ALL) or (kind in _EITHER_WAY and not real and chance.random() < 0.1)
    case = Case(
        number=number,
        kind=kind,
        real=real,
        daemon=daemon,
        micro=micro,
        accumulation=EFFECTIVE_BATCH // micro,
        max_steps=REAL_STEPS if real else _STEPS,
        save_total_limit=chance.choice((None, 2)),
        spec=Spec(
            folder="",
            seed=chance.randrange(1000),
            law=Law(fixed_bytes=_FIXED_BYTES, token_bytes=4096),
            step_s=chance.uniform(0.01, 0.03),
            legacy=not real and chance.random() < 0.5,
        ),
    )
    case = _with_outside(case, chance) if kind in FROM_OUTSIDE else _MAKERS.get(kind, _with_strike)(case, chance)
    return case if real or kind in _ALONE or case.outside or chance.random() < 0.7 else _with_second(case, chance)


def _step(case: Case, chance: random.Random) -> int:
    return chance.randrange(2, case.max_steps)


def _with_outside(case: Case, chance: random.Random) -> Case:
    """At the start, at a step, or while a recovery waits."""
    when = chance.choice(("start", "step", "step", "recovery"))
    if when == "start":
        return replace(case, outside=(Outside(case.kind, 0, chance.uniform(0, 8.0 if case.real else 1.0)),))
    step = chance.randrange(1, case.max_steps // 2)
    if when == "step":
        return replace(case, outside=(Outside(case.kind, step, chance.uniform(0, 0.1)),))
    spec = replace(case.spec, strikes=(Strike(Fault.KILL_TRAINER, step + 1),))
    return replace(case, spec=spec, outside=(Outside(case.kind, step, chance.uniform(0, 7.0)),))


def _with_strike(case: Case, chance: random.Random) -> Case:
    strikes = (*case.spec.strikes, Strike(case.kind, _step(case, chance)))
    return replace(case, spec=replace(case.spec, strikes=strikes))


def _with_damage(case: Case, chance: random.Random) -> Case:
    """After the second save at the earliest, so that an older checkpoint is there."""
    step = case.save_steps * chance.randrange(2, case.max_steps // case.save_steps)
    return replace(case, spec=replace(case.spec, strikes=(Strike(case.kind, step),)))


def _at_load(case: Case, chance: random.Random) -> Case:
    """The first load, or the one after a kill."""
    killed = (Strike(Fault.KILL_TRAINER, _step(case, chance)),) if chance.random() < 0.5 else ()
    strikes = (*killed, Strike(Fault.OOM_LOAD, 1 + len(killed)))
    return replace(case, spec=replace(case.spec, strikes=strikes))


def _with_workers(case: Case, chance: random.Random) -> Case:
    return replace(_with_strike(case, chance), workers=chance.choice((2, 4)))


def _with_clock(case: Case, chance: random.Random) -> Case:
    """The clock jumps, and the trainer is killed after that: what is recovered was written on both sides."""
    step = _step(case, chance)
    strikes = (Strike(Fault.CLOCK_JUMP, step), Strike(Fault.KILL_TRAINER, chance.randrange(step, case.max_steps + 1)))
    before, after = chance.choice(((3600, 0), (0, 86400), (0, -86400), (86400 * 365, 0)))
    return replace(case, spec=replace(case.spec, strikes=strikes, clock_before=before, clock_after=after))


def _too_big_a_micro(case: Case, chance: random.Random) -> Case:
    micro = chance.choice((4, 8))
    fits = chance.choice([size for size in (1, 2, 4) if size < micro])
    law = _law(case, fits, case.spec.tokens, chance)
    return replace(case, micro=micro, accumulation=EFFECTIVE_BATCH // micro, spec=replace(case.spec, law=law))


def _a_long_sample(case: Case, chance: random.Random) -> Case:
    micro = chance.choice((4, 8))
    fits = chance.choice([size for size in (1, 2, 4) if size < micro <= 4 * size])
    long = 5 * case.spec.tokens
    spec = replace(
        case.spec, law=_law(case, fits, long, chance), long_tokens=long, long_step=chance.randrange(2, case.max_steps)
    )
    return replace(case, micro=micro, accumulation=EFFECTIVE_BATCH // micro, spec=spec)


def _a_big_evaluation(case: Case, chance: random.Random) -> Case:
    long = 5 * case.spec.tokens
    fits = chance.choice((2, 4))
    spec = replace(case.spec, law=_law(case, fits, long, chance), eval_tokens=long)
    return replace(case, evaluation=chance.choice((8, 16)), eval_steps=chance.choice((3, 5, 6)), spec=spec)


def _law(case: Case, fits: int, tokens: int, chance: random.Random) -> Law:
    """Under which `fits` samples of so many tokens fit into the limit, and twice as many do not."""
    room = case.limit_bytes - _FIXED_BYTES - (_TORCH_BYTES if case.real else _PYTHON_BYTES)
    return Law(fixed_bytes=_FIXED_BYTES, token_bytes=int(room / (fits * tokens * chance.uniform(1.1, 1.5))))


def _with_second(case: Case, chance: random.Random) -> Case:
    """Something else, somewhere else, after which the same config goes on."""
    other = chance.choice([kind for kind in (Fault.KILL_TRAINER, Fault.KILL_IN_SAVE) if kind is not case.kind])
    strike = Strike(other, _step(case, chance))
    return replace(case, spec=replace(case.spec, strikes=(*case.spec.strikes, strike)))


_MAKERS: dict[Fault, Callable[[Case, random.Random], Case]] = {
    Fault.OOM_FIRST_STEP: _too_big_a_micro,
    Fault.OOM_MID_EPOCH: _a_long_sample,
    Fault.OOM_EVALUATION: _a_big_evaluation,
    Fault.OOM_LOAD: _at_load,
    Fault.HOST_OOM: _with_workers,
    Fault.WORKER_KILLED: _with_workers,
    Fault.CLOCK_JUMP: _with_clock,
    Fault.TRUNCATED: _with_damage,
    Fault.INCOMPLETE: _with_damage,
    Fault.GARBAGE: _with_damage,
}
_KINDS = tuple(Fault)
_REAL_KINDS = tuple(kind for kind in Fault if kind not in (Fault.CLOCK_JUMP, Fault.HOST_OOM, Fault.WORKER_KILLED))
_EITHER_WAY = frozenset(Fault) - {Fault.DOUBLE_SIGNAL}  # a signal to a job's supervisor is a cancel
#: Without a second fault, which would blur what the first one calls for.
_ALONE = frozenset({Fault.BUG, Fault.DISK_FULL, Fault.OOM_LOAD, Fault.OOM_SAVE, Fault.CLOCK_JUMP})
