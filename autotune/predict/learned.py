"""What stored trials of a card teach: its context, and how far predicted memory and time were off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from autotune.predict.context import Context
from autotune.predict.forecast import ALLOCATED_INTERVAL, Target
from autotune.predict.steptime import INTERVAL
from autotune.values import GIB, LIBRARIES, MIB, Environment, Origin, TrialRecord, Verdict

LARGEST_CORRECTION = 1.25  # of memory: a ratio beyond it, either way, is no error of a prediction but another cause
LARGEST_TIME_CORRECTION = 5.0
LARGEST_CONTEXT_BYTES = 4 * GIB
CONTEXT_MARGIN_BYTES = 32 * MIB  # kernels that another config loads or does not; texts are rounded to 15 MiB
SEGMENT_BYTES = 20 * MIB  # a text's "tried to allocate" is the segment, up to this much more than was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Measurements of one thing: how many, in the middle, and the outermost.

    `independent`: of them, what says something new: each of the model asked about; of other models one a model.
    """

    count: int
    median: float
    low: float
    high: float
    independent: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What was measured on a card. None: nothing that can be used."""

    trials: int  # of this card, whether they taught anything or not
    environment: Environment | None  # whose driver and torch the context is of, and whose libraries the memory is of
    context: Spread | None = None  # bytes
    memory: Spread | None = None  # measured ÷ predicted
    time: Spread | None = None


def learn(
    trials: Iterable[TrialRecord], environment: Environment | None = None, *, model_fingerprint: str | None = None
) -> Learned:
    """What these trials of one device, oldest first, say of a fit in `environment` (None: the newest trial's).

    The context is of the same driver and torch; memory of the same libraries; memory and time of predictions by the
    same autotune, and where there are any of the model asked about, of that alone.
    """
    here = [trial for trial in trials if trial.origin is not Origin.DATABASE]
    environment = environment or (here[-1].environment if here else None)
    if environment is None:
        return Learned(trials=0, environment=None)

    def of_same(*names: str) -> list[TrialRecord]:
        return [t for t in here if all(getattr(t.environment, n) == getattr(environment, n) for n in names)]

    return Learned(
        trials=len(here),
        environment=environment,
        context=_context(of_same("driver", "torch")),
        memory=_of_model(of_same("autotune", *LIBRARIES), model_fingerprint, _memory),
        time=_of_model(of_same("autotune"), model_fingerprint, _time),
    )


def with_learned(target: Target, learned: Learned) -> Target:
    """The target as it was found here to be; what was not measured stays as it was. The CPU has no context."""
    context, memory, time = learned.context, learned.memory, learned.time
    if context and target.kernels.kind != "cpu" and learned.environment:
        target = replace(target, context=_measured(context, learned.environment))
    if memory:
        below, above = memory.low / memory.median, memory.high / memory.median
        target = replace(
            target,
            memory_factor=memory.median,
            memory_interval=(below * (1 - ALLOCATED_INTERVAL), above * (1 + ALLOCATED_INTERVAL)),
        )
    if time:
        share = 1 / (time.independent + 1)  # of the allowance for what nobody measured: the more is known, the less
        below, above = time.low / time.median, time.high / time.median
        target = replace(
            target,
            time_factor=time.median,
            time_interval=(below * INTERVAL[0] ** share, above * INTERVAL[1] ** share),
        )
    return target


def _measured(context: Spread, environment: Environment) -> Context:
    probes = "1 probe" if context.count == 1 else f"{context.count} probes"
    return Context(
        low_bytes=max(0, round(context.low) - CONTEXT_MARGIN_BYTES),
        likely_bytes=round(context.median),
        high_bytes=round(context.high) + CONTEXT_MARGIN_BYTES,
        source=f"measured here by {probes}, driver {environment.driver or 'unknown'}, torch {environment.torch}",
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What one trial says of a value: itself, or a bound that it is not under or not over."""

    exact: float | None = None
    at_least: float | None = None
    at_most: float | None = None


def _spread(found: Sequence[_Found], plain: float | None = None, independent: int = 1) -> Spread | None:
    """The median counts a bound only where it says something: a lower one above the values, an upper one below.

    `plain`: the value that bounds are held against where there is no exact one; None: they teach nothing alone.
    """
    exact = [one.exact for one in found if one.exact is not None]
    middle = statistics.median(exact) if exact else plain
    if middle is None:
        return None
    bounds = [one.at_least for one in found if one.at_least is not None and one.at_least > middle]
    bounds += [one.at_most for one in found if one.at_most is not None and one.at_most < middle]
    values = sorted([*exact, *bounds])
    if not values:
        return None
    return Spread(
        count=len(values),
        median=statistics.median(values),
        low=values[0],
        high=values[-1],
        independent=independent,
    )


def _context(trials: Sequence[TrialRecord]) -> Spread | None:
    found = [one for trial in trials for one in _contexts_of(trial)]
    return _spread([one for one in found if 0 < _any(one) <= LARGEST_CONTEXT_BYTES])


def _contexts_of(trial: TrialRecord) -> Iterator[_Found]:
    """Bytes of the context that one trial saw; nothing of a CPU, nor where paged optimizer state is on the card too."""
    if trial.environment.threads is not None or trial.config.optimizer.startswith("paged"):
        return
    report, numbers = trial.report, trial.judgement.numbers
    others = _others_bytes(trial)
    if trial.judgement.verdict is Verdict.FITS:
        if report.device_used_bytes and report.peak_reserved_bytes and others is not None:
            yield _Found(report.device_used_bytes - report.peak_reserved_bytes - others)
        return
    process, reserved = numbers.get("process_bytes"), numbers.get("reserved_bytes")
    total, free = numbers.get("total_bytes"), numbers.get("free_bytes")
    if process and reserved:
        yield _Found(process - reserved)
    elif total and free is not None and reserved:
        yield _Found(at_most=total - free - reserved)  # what others hold is in it
    elif total and free is not None and report.peak_reserved_bytes and others is not None:
        yield _Found(at_least=total - free - report.peak_reserved_bytes - others)


def _others_bytes(trial: TrialRecord) -> int | None:
    """Held by others on the card: before the worker started, or by those seen meanwhile; None: some do not say."""
    seen = [tenant.used_bytes for tenant in trial.report.tenants]
    before = trial.report.device_used_before_bytes
    if None in seen:
        return before
    return max(before or 0, sum(size for size in seen if size is not None))


def _any(found: _Found) -> float:
    return next(value for value in (found.exact, found.at_least, found.at_most) if value is not None)


def _of_model(
    trials: Sequence[TrialRecord], fingerprint: str | None, ratios: Callable[[TrialRecord], Iterator[_Found]]
) -> Spread | None:
    """The ratios of the model asked about, or, where it has none, of all models."""
    own = [one for trial in trials if trial.model_fingerprint == fingerprint for one in ratios(trial)]
    if any(one.exact is not None for one in own):
        return _spread(own, plain=1.0, independent=sum(one.exact is not None for one in own))
    found = [(trial.model_fingerprint, one) for trial in trials for one in ratios(trial)]
    return _spread([one for _, one in found], plain=1.0, independent=len({model for model, _ in found}))


def _memory(trial: TrialRecord) -> Iterator[_Found]:
    """Measured peak ÷ what was predicted of it before any correction; of one that ran out, a peak it went beyond.

    A proof runs an evaluation, which is in the predicted peak; a probe runs none.
    """
    prediction, report = trial.prediction, trial.report
    if prediction is None or not prediction.memory_factor:
        return
    is_whole = trial.origin is Origin.PROOF
    predicted = prediction.peak_allocated_bytes if is_whole else prediction.training_peak_allocated_bytes
    if not predicted:
        return
    plain = predicted / prediction.memory_factor
    found = _Found()
    if trial.judgement.verdict is Verdict.FITS and report.peak_allocated_bytes:
        found = _Found(report.peak_allocated_bytes / plain)
    elif trial.judgement.verdict is Verdict.DEVICE_OOM:
        tried, allocated = (trial.judgement.numbers.get(f"{name}_bytes") for name in ("tried", "allocated"))
        wanted = allocated + tried - SEGMENT_BYTES if tried and allocated else 0
        found = _Found(at_least=max(wanted, report.peak_allocated_bytes or 0) / plain)
    if found != _Found() and 1 / LARGEST_CORRECTION <= _any(found) <= LARGEST_CORRECTION:
        yield found


def _time(trial: TrialRecord) -> Iterator[_Found]:
    """Measured step time ÷ what was predicted of it before any correction."""
    prediction = trial.prediction
    measured = trial.report.step_time_s(trial.config.gradient_accumulation_steps)
    if trial.judgement.verdict is not Verdict.FITS or not measured:
        return
    if prediction is None or not prediction.step_time_s or not prediction.time_factor:
        return
    ratio = measured * prediction.time_factor / prediction.step_time_s
    if 1 / LARGEST_TIME_CORRECTION <= ratio <= LARGEST_TIME_CORRECTION:
        yield _Found(ratio)
