"""The search itself: proposals out, observations in, so that a recorded fit replays without a device.

From the trainers' usual micro batch down to one that fits; from there smaller and larger ones while they are faster;
at the wall the ladder's exact moves make room; each setting is tried at the best point, until a round brings nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

from autotune.protocols import Strategy
from autotune.search.space import SearchSpace, needs_at_least, with_setting
from autotune.values import Device, FitRequest, Preserves, TrainingConfig

#: A spread above this does not widen a tie: the median decides, or a noisy machine would call everything equal.
WIDEST_TIE = 0.05
#: Where a fit begins, as runs that nobody has fitted do: TrainingArguments.per_device_train_batch_size's default.
USUAL_MICRO_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Proposal:
    """A config to measure next."""

    config: TrainingConfig
    reason: str  # in words, for people
    moves: tuple[str, ...]  # strategies, or "field=value", that lead from the request's start to it


@dataclass(frozen=True, slots=True)
class Observation:
    """What measuring a proposal gave. Verdicts that are not about memory end a fit and never come here."""

    config: TrainingConfig
    fits: bool
    out_of_memory: bool
    tokens_per_second: float | None
    spread: float | None  # uncertainty of tokens_per_second, a fraction of it; None: not known
    peak_bytes: int | None
    probed: bool = True  # False: predicted not to fit, and taken at its word
    step_time_s: float | None = None  # of an optimizer step, as tokens_per_second has it
    times_s: tuple[float, ...] = ()  # of its micro batches
    needed_bytes: int | None = None  # what was held against the limit, where that is more than tensors; else the peak
    reserved_bytes: int | None = None  # what the caching allocator held; None: there is none, as on the CPU
    wanted_bytes: int | None = None  # ran out: what it held and the allocation that failed, so at least this
    start_s: float | None = None  # of the probe, what was not timed steps; None: of a fresh process
    cut_short: bool = False  # it could not win any more

    @property
    def speed(self) -> float:
        """Tokens per second; a fit that was not timed counts as the slowest."""
        return self.tokens_per_second or 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found."""

    ranked: tuple[Observation, ...]  # those that fit, best first; ties go to less memory
    ties: tuple[Observation, ...]  # the others as fast as the best, within tolerance and spread
    stopped: str  # why it ended, in words
    closest: Observation | None  # only when nothing fits: the last one down the ladder
    #: Of those that fit: logarithm of seconds per token as it is believed, and its deviation; {}: as measured.
    believed: Mapping[TrainingConfig, tuple[float, float]] = field(default_factory=dict)
    hopeless: int = 0  # configs that were predicted not to fit and not probed

    @property
    def best(self) -> Observation | None:
        return self.ranked[0] if self.ranked else None


T = TypeVar("T")
Steps: TypeAlias = Generator[Proposal, Observation, T]


def climb(
    space: SearchSpace,
    ladder: Sequence[Strategy],
    request: FitRequest,
    device: Device,
    tolerance: float = 0.02,
    max_probes: int = 24,
) -> Steps[Outcome]:
    """Yield configs to measure, receive what each gave, return the outcome.

    No config comes twice and at most `max_probes` come. A speed that rises by no more than `tolerance` (a fraction)
    does not count as rising. The same observations always give the same proposals.
    """
    climber = _Climber(space, ladder, request, device, tolerance, max_probes)
    try:
        stopped = yield from climber.run()
    except _OutOfProbes:
        stopped = f"stopped after {max_probes} probes, the most allowed"
    return conclude(space, climber.seen.values(), stopped, tolerance)


def conclude(space: SearchSpace, observations: Iterable[Observation], stopped: str, tolerance: float = 0.02) -> Outcome:
    """The outcome of what was observed so far, in the order it was."""
    observed = list(observations)
    ranked = rank(space, (item for item in observed if item.fits), tolerance)
    failed = [item for item in observed if item.out_of_memory]
    return Outcome(
        ranked=ranked,
        ties=tuple(item for item in ranked[1:] if _tied(space, item, ranked[0], tolerance)),
        stopped=stopped,
        closest=failed[-1] if failed and not ranked else None,
    )


def rank(space: SearchSpace, fits: Iterable[Observation], tolerance: float) -> tuple[Observation, ...]:
    """Best first: what gives up least, then the fastest; of those as fast as it, the one with the smallest peak."""
    left, ranked = list(fits), []
    while left:
        fastest = min(left, key=lambda item: (space.given_up(item.config), -item.speed))
        ties = [item for item in left if _tied(space, item, fastest, tolerance)]
        ranked.append(min(ties, key=lambda item: (item.peak_bytes is None, item.peak_bytes or 0)))
        left.remove(ranked[-1])
    return tuple(ranked)


def _tied(space: SearchSpace, one: Observation, other: Observation, tolerance: float) -> bool:
    """Whether neither is faster beyond tolerance and spread. Configs that give up different things never tie."""
    if space.given_up(one.config) != space.given_up(other.config):
        return False
    spread = min(WIDEST_TIE, (one.spread or 0.0) + (other.spread or 0.0))
    slower, faster = sorted((one.speed, other.speed))
    return faster <= slower * (1 + max(tolerance, spread))


class _OutOfProbes(Exception):
    """The search may not ask for more."""


class _Climber:
    """One climb: what it has seen, and its moves as generators."""

    def __init__(
        self,
        space: SearchSpace,
        ladder: Sequence[Strategy],
        request: FitRequest,
        device: Device,
        tolerance: float,
        max_probes: int,
    ) -> None:
        self.space, self.ladder, self.request, self.device = space, ladder, request, device
        self.tolerance, self.max_probes = tolerance, max_probes
        self.seen: dict[TrainingConfig, Observation] = {}
        self.named: dict[tuple[str, Any], str] = {}  # (field, new value): the strategy that sets it

    def run(self) -> Steps[str]:
        """All of it. Returns why it stopped."""
        if (yield from self.first_fit()) is None:
            return "nothing fits: every move that is allowed was taken"
        while True:
            before = self.best()
            yield from self.shrink(self.best())
            yield from self.vary()
            yield from self.grow(self.best())
            if not self.rises(self.best(), before):
                return f"no larger micro batch and no setting is faster by more than {self.tolerance:.0%}"

    def best(self) -> Observation:
        """The fastest that fits, among those that give up least."""
        fits = (item for item in self.seen.values() if item.fits)
        return min(fits, key=lambda item: (self.space.given_up(item.config), -item.speed))

    def rises(self, to: Observation, start: Observation) -> bool:
        return to.speed > start.speed * (1 + self.tolerance)

    def first_fit(self) -> Steps[Observation | None]:
        """The trainers' usual micro batch as asked for, or a smaller one; then down the ladder, consent last."""
        config = self.space.start
        usual = [size for size in self.space.micro_batch_sizes if size <= USUAL_MICRO_BATCH_SIZE]
        asked = [self.space.resize(config, size) for size in reversed(usual)]
        found = yield from self.first_that_fits(asked, "the settings asked for")
        for preserves in Preserves:
            if found is not None:
                return found
            rungs = self.rungs(config, preserves)
            found = yield from self.first_that_fits(rungs, "out of memory: down the ladder")
            config = rungs[-1] if rungs else config
        return found

    def grow(self, point: Observation) -> Steps[None]:
        """Larger micro batches while they are faster; at the wall, with the exact moves that make room for one."""
        while (larger := self.larger(point.config)) is not None:
            found = yield from self.first_that_fits([larger], "faster so far: a larger micro batch")
            if found is not None and not self.rises(found, point):
                return
            if found is None and self.gains_from_size(point):
                found = yield from self.squeeze(point.config, larger)
            if found is None:
                return
            point = found

    def gains_from_size(self, point: Observation) -> bool:
        """Whether this micro batch is faster than a smaller one; True where none is known. Else no room is made."""
        smaller = (self.seen.get(config) for config in self.sizes(point.config, below=point.config.micro_batch_size))
        known = next((item for item in smaller if item is not None and item.fits), None)
        return known is None or self.rises(point, known)

    def shrink(self, point: Observation) -> Steps[None]:
        """Smaller micro batches while they are faster: processors with small caches are quicker with less at once."""
        for smaller in self.sizes(point.config, below=point.config.micro_batch_size):
            found = yield from self.ask(smaller, "perhaps a smaller micro batch is faster")
            if found is None or not found.fits or not self.rises(found, point):
                return
            point = found

    def squeeze(self, config: TrainingConfig, larger: TrainingConfig) -> Steps[Observation | None]:
        """Past the wall: the sizes before it as they are, then the exact moves at the largest size they make fit."""
        between = self.sizes(config, above=config.micro_batch_size, below=larger.micro_batch_size)
        yield from self.first_that_fits(between, "between one that fits and one that does not")
        for target in (larger, *between):
            if self.is_known_to_fit(target):
                return None
            rungs = self.rungs(target, Preserves.EXACT)
            found = yield from self.first_that_fits(rungs, "out of memory: room for a larger micro batch")
            if found is not None:
                return found
        return None

    def vary(self) -> Steps[None]:
        """Each other value of each setting, at the best point so far or the largest micro batch that it allows."""
        for name, values in self.space.settings.items():
            for value in values:
                best = self.best().config
                if self.is_known_slower(name, value, than=getattr(best, name)):
                    continue
                changed = with_setting(best, name, value)
                reason = f"another {name}: {value}"
                smaller = self.sizes(changed, below=best.micro_batch_size)
                yield from self.first_that_fits([changed, *self.rungs(changed, Preserves.EXACT)], reason)
                yield from self.first_that_fits([changed, *smaller], reason)

    def first_that_fits(self, configs: Sequence[TrainingConfig], reason: str) -> Steps[Observation | None]:
        """The first of `configs`, ordered from most memory to least, that fits: gallop to one, then halve the gap."""
        low, step = -1, 1
        high = next((place for place, config in enumerate(configs) if self.is_known_to_fit(config)), len(configs))
        found, galloping = self.seen.get(configs[high]) if high < len(configs) else None, True
        while high - low > 1:
            middle = min(low + step, high - 1) if galloping else (low + high) // 2
            observation = yield from self.ask(configs[middle], reason)
            if observation is not None and observation.fits:
                found, high, galloping = observation, middle, False
            else:
                low, step = middle, step * (2 if observation is not None else 1)  # what is known costs no probe
        return found

    def is_known_slower(self, name: str, value: Any, *, than: Any) -> bool:
        """Whether two that fit, alike in all but `name`, say so. It is taken to hold for other configs too."""
        for one in self.seen.values():
            other = self.seen.get(with_setting(one.config, name, than))
            if getattr(one.config, name) == value and other is not None and one.fits and self.rises(other, one):
                return True
        return False

    def is_known_to_fit(self, config: TrainingConfig) -> bool:
        return config in self.seen and self.seen[config].fits

    def ask(self, config: TrainingConfig, reason: str) -> Steps[Observation | None]:
        """What measuring `config` gives, from memory where it is known; None where it cannot fit or is not legal."""
        if config in self.seen:
            return self.seen[config]
        if self.space.legal(config) is not None or self.must_run_out(config):
            return None
        if sum(item.probed for item in self.seen.values()) >= self.max_probes:
            raise _OutOfProbes
        self.seen[config] = yield Proposal(config, reason, self.moves(config))
        return self.seen[config]

    def must_run_out(self, config: TrainingConfig) -> bool:
        return any(item.out_of_memory and needs_at_least(config, item.config) for item in self.seen.values())

    def larger(self, config: TrainingConfig) -> TrainingConfig | None:
        """The micro batch doubled, or the next size above that; None at the largest."""
        size = config.micro_batch_size
        above = [other for other in self.space.micro_batch_sizes if other >= 2 * size]
        return self.space.resize(config, above[0]) if above else None

    def sizes(self, config: TrainingConfig, *, above: int = 0, below: int) -> list[TrainingConfig]:
        """`config` at each micro batch size between the two, largest first."""
        sizes = [size for size in self.space.micro_batch_sizes if above < size < below]
        return [self.space.resize(config, size) for size in reversed(sizes)]

    def rungs(self, config: TrainingConfig, preserves: Preserves) -> list[TrainingConfig]:
        """`config` after each further move of the ladder that keeps the micro batch, one upon the other."""
        rungs: list[TrainingConfig] = []
        for strategy in self.ladder:
            while strategy.preserves is preserves:
                lower = strategy.apply(config, self.request, self.device)
                if lower is None or lower in (config, *rungs) or not self.keeps_batch(lower, config):
                    break
                self.named |= dict.fromkeys(_changes(config, lower), strategy.name)
                rungs.append(lower)
                config = lower
        return rungs

    def keeps_batch(self, lower: TrainingConfig, config: TrainingConfig) -> bool:
        return lower.micro_batch_size == config.micro_batch_size and self.space.legal(lower) is None

    def moves(self, config: TrainingConfig) -> tuple[str, ...]:
        """How `config` differs from the request's start, in the ladder's names; the micro batch is no move."""
        before = replace(
            self.request.start,
            micro_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        changes = _changes(before, config)
        names = [self.named.get(change, f"{change[0]}={change[1]}") for change in changes]
        return tuple(dict.fromkeys(names))


def _changes(before: TrainingConfig, after: TrainingConfig) -> list[tuple[str, Any]]:
    """The fields that differ, with their new values."""
    pairs = ((item.name, getattr(after, item.name)) for item in fields(TrainingConfig))
    return [(name, value) for name, value in pairs if getattr(before, name) != value]
