"""The search with predictions: probe where the expected gain for a second of probing is highest, learn, stop. Pure.

Proposals out, observations in, as `climb` does. Levels are spaces in the order of what they give up: the next one is
entered only where nothing fits in the one before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotune.mix import tokens_per_row
from autotune.protocols import Predictor
from autotune.search.belief import (
    CPU_DOUBT,
    GPU_DOUBT,
    Believed,
    MemoryBelief,
    TimeBelief,
    Vector,
    expected_gains,
    noise_of,
    oddities,
)
from autotune.search.climb import Observation, Outcome, Proposal, Steps
from autotune.search.remember import needed_bytes, remember
from autotune.search.space import SearchSpace, kept_layers, needs_at_least
from autotune.values import AllocatorSetting, Device, LossPath, Prediction, TrainingConfig, Upcast

SAFE = 0.9  # probability of fitting that the first probe, and any other without a fit so far, should have
LIKELY = 0.4  # that a probe should have once something fits: an out-of-memory teaches little more
HOPELESS = 0.05  # below it a config is not probed, however fast
WORTH_A_TRY = 0.1  # of the most likely config of a level, before the next level gives something up
PATIENCE = 6  # probes after which one has to promise all of the tolerance: before less, after more, in proportion
RISKY = 0.3  # probability of that, from which on segments that grow are tried instead
RETRIES_COST = 0.25  # of the step time, where the allocator has to give its cache back
LESS_MEMORY = 0.005  # of speed, that a config with a smaller peak may be slower

#: Seconds of a warm probe that are not training, before one was seen.
_START_S = {"cpu": 1.0}
_USUAL_START_S = 3.0
_MICRO_BATCHES = 6  # of a probe: one to warm up, the timed ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """A trial from before: what was predicted of it, with nothing learned, and what it measured."""

    config: TrainingConfig
    seconds: Mapping[str, float]
    step_time_s: float
    times_s: tuple[float, ...]
    same_model: bool


#: Of another model's step time: what its kernels' shapes change, a fraction.
_OTHER_MODEL = 0.08


@dataclass
class _Level:
    """One space and what is known of its configs."""

    space: SearchSpace
    configs: list[TrainingConfig]
    seconds: dict[TrainingConfig, Mapping[str, float]] = field(default_factory=dict)  # predicted
    bounds: dict[TrainingConfig, Mapping[str, float]] = field(default_factory=dict)  # of those that nobody traced yet
    memory: dict[TrainingConfig, Prediction] = field(default_factory=dict)
    out: set[TrainingConfig] = field(default_factory=set)  # untraceable, or known not to run
    alike: dict[tuple[object, ...], list[TrainingConfig]] = field(default_factory=dict)  # by settings
    alike_but_resorts: dict[TrainingConfig, list[TrainingConfig]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for config in self.configs:
            self.alike.setdefault(settings_key(config), []).append(config)
            self.alike_but_resorts.setdefault(without_resorts(config), []).append(config)


def seek(
    levels: Sequence[SearchSpace],
    predictor: Predictor,
    device: Device,
    *,
    known: Iterable[Observation] = (),
    earlier: Iterable[Earlier] = (),
    tolerance: float = 0.01,
    max_probes: int = 24,
) -> Steps[Outcome | None]:
    """Yield configs to measure, receive what each gave, return the outcome; None where nothing can be predicted.

    `known` are observations of this request, `earlier` trials of this device. It ends where no probe is expected to
    gain more than `tolerance` (a fraction). No config comes twice and at most `max_probes` come.
    """
    seeker = _Seeker(levels, predictor, device, tolerance, max_probes)
    return (yield from seeker.run(list(known), list(earlier)))


class _Seeker:
    """One search: its beliefs, and what it has seen."""

    def __init__(
        self,
        levels: Sequence[SearchSpace],
        predictor: Predictor,
        device: Device,
        tolerance: float,
        max_probes: int,
    ) -> None:
        self.levels, self.predictor, self.device = levels, predictor, device
        self.tolerance, self.max_probes = tolerance, max_probes
        self.mix = levels[0].request.lengths
        doubt = CPU_DOUBT if device.kind == "cpu" else GPU_DOUBT
        self.time = TimeBelief(doubt)
        allowed = predictor.allowed_bytes
        self.memory = MemoryBelief(doubt, allowed) if allowed else None  # None: nothing is known to be the limit
        self.seen: dict[TrainingConfig, Observation] = {}
        self.probes = 0
        self.starts: list[float] = []
        self.hopeless: set[TrainingConfig] = set()  # predicted not to fit, by what is believed now
        self.beyond: list[TrainingConfig] = []  # of these the ones whose memory was predicted
        self.spared: set[TrainingConfig] = set()  # another does the same with less

    def run(self, known: Sequence[Observation], earlier: Sequence[Earlier]) -> Steps[Outcome | None]:
        for trial in earlier:
            noise = math.hypot(noise_of(trial.times_s), 0.0 if trial.same_model else _OTHER_MODEL)
            self.time.observe(trial.config, trial.seconds, trial.step_time_s, noise)
        for observation in known:
            self.learn(observation)
        stopped = _NOTHING
        opened: list[_Level] = []
        for space in self.levels:
            level = _Level(space, sorted(space.configs(), key=_last_resorts))
            if not self.open(level):
                if not opened:
                    return None
                continue
            opened.append(level)
            self.time.oddities = oddities(level.configs)
            stopped = yield from self.level(level)
            if self.fits_of(level):
                return self.outcome(level, stopped)
        if not self.seen and (yield from self.see_one(opened[-1])):
            stopped = yield from self.level(opened[-1])
        return self.outcome(opened[-1], stopped)

    def fits_of(self, level: _Level) -> list[TrainingConfig]:
        """The configs of a level that were measured and fit."""
        return [config for config in level.configs if config in self.seen and self.seen[config].fits]

    def see_one(self, level: _Level) -> Steps[bool]:
        """Nothing fits, as predicted: the config that would take least is measured, so that a fit has seen one."""
        if not level.memory:
            return False
        config = min(level.memory, key=lambda one: needed_bytes(level.memory[one]))
        yield from self.probe(level, config, "nothing is predicted to fit: the closest is measured")
        return self.seen[config].fits

    def open(self, level: _Level) -> bool:
        """Trace the quickest and the smallest settings; False where they cannot be."""
        ends = [end for size in self._two_sizes(level) for end in (quickest(level, size), smallest(level, size))]
        self.predictor.prepare(dict.fromkeys(ends))
        for config in dict.fromkeys(ends):
            self.trace(level, config)
        self.take_at_hand(level)
        self.bound(level)
        return bool(level.seconds)

    def rule_out(self, level: _Level) -> None:
        """From the smallest micro batch up, see whether what takes least may fit: where not, nothing larger does."""
        for size in sorted({config.micro_batch_size for config in level.configs}):
            least = smallest(level, next(c for c in level.configs if c.micro_batch_size == size))
            if least in level.seconds and self.chance(level, least) < HOPELESS:
                return

    def _two_sizes(self, level: _Level) -> list[TrainingConfig]:
        """A config of one sample and one of several: they have traces of their own."""
        one = [config for config in level.configs if config.micro_batch_size == 1][:1]
        return [*one, *[config for config in level.configs if config.micro_batch_size > 1][:1]]

    def trace(self, level: _Level, config: TrainingConfig) -> bool:
        """Make sure of the config's predicted time; False where it cannot be predicted, and it is left out."""
        if config in level.seconds:
            return True
        seconds = self.predictor.seconds(config)
        if not seconds:
            level.out.add(config)
            return False
        level.seconds[config] = seconds
        return True

    def take_at_hand(self, level: _Level) -> None:
        """Predicted times that need no new trace."""
        ready: dict[tuple[object, ...], bool] = {}
        for config in level.configs:
            if config in level.seconds or config in level.out:
                continue
            key = trace_key(config)
            if key not in ready:
                ready[key] = self.predictor.at_hand(config)
            if ready[key] and self.predictor.at_hand(config):
                self.trace(level, config)

    def bound(self, level: _Level) -> None:
        """Of every other config the time of those that surely take no longer, or what lies between two."""
        traced: dict[tuple[object, ...], list[TrainingConfig]] = {}
        for config in level.seconds:
            traced.setdefault(_sizes(config), []).append(config)
        for config in level.configs:
            if config in level.seconds or config in level.out:
                continue
            near = traced.get(_sizes(config), [])
            quicker = [level.seconds[other] for other in near if is_no_slower(other, config)]
            between = self.between(level, config)
            if between is not None:
                level.bounds[config] = between
            elif quicker or near:
                level.bounds[config] = max(quicker or [level.seconds[o] for o in near], key=lambda s: sum(s.values()))

    @staticmethod
    def between(level: _Level, config: TrainingConfig) -> dict[str, float] | None:
        """Of a config that checkpoints every Nth layer, from those that checkpoint none and all."""
        if not config.gradient_checkpointing.startswith("every_"):
            return None
        off, full = (level.seconds.get(replace(config, gradient_checkpointing=name)) for name in ("off", "full"))
        if off is None or full is None:
            return None
        share = 1 / int(config.gradient_checkpointing.removeprefix("every_"))
        return {kind: s + share * (full.get(kind, s) - s) for kind, s in off.items()}

    def tokens(self, config: TrainingConfig) -> float:
        """Of an optimizer step, those that count: padding does where no dataset says what it is."""
        return tokens_per_row(config, self.mix) * config.effective_batch_size if self.mix else config.tokens_per_step

    def level(self, level: _Level) -> Steps[str]:
        """Probe at one level until it is not worth it. Returns why it stopped."""
        while True:
            if self.probes >= self.max_probes:
                return f"stopped after {self.max_probes} probes, the most allowed"
            choice = self.choose(level)
            if isinstance(choice, str):
                return choice
            yield from self.probe(level, *choice)

    def probe(self, level: _Level, config: TrainingConfig, reason: str) -> Steps[None]:
        self.probes += 1
        observation = yield Proposal(config, reason, ())
        self.learn(observation)
        if not observation.fits and not observation.out_of_memory:
            level.out |= {other for other in level.configs if self.shares_what_failed(config, other)}

    def shares_what_failed(self, failed: TrainingConfig, other: TrainingConfig) -> bool:
        """Whether `other` has all the settings of `failed` that nothing that ran had: this model lacks one of them."""
        ran = [config for config, seen in self.seen.items() if seen.fits or seen.out_of_memory]
        new = [n for n in _TRACED if all(getattr(config, n) != getattr(failed, n) for config in ran)] or list(_TRACED)
        return all(getattr(other, name) == getattr(failed, name) for name in new)

    def learn(self, observation: Observation) -> None:
        """An observation into both beliefs."""
        config = observation.config
        self.seen[config] = observation
        self.hopeless, self.spared, self.beyond = set(), set(), []
        expected = self.predictor.expect(config)
        if expected is None:
            return
        seconds = self.predictor.seconds(config)
        if observation.fits and observation.step_time_s and seconds:
            slowed = self.retries_of(config, expected) * RETRIES_COST / 2  # it may hold time for giving the cache back
            noise = math.hypot(noise_of(observation.times_s), slowed)
            self.time.observe(config, seconds, observation.step_time_s, noise)
        if observation.start_s is not None:
            self.starts.append(observation.start_s)
        if self.memory is not None:
            remember(self.memory, expected, observation, on_cpu=self.device.kind == "cpu")

    def choose(self, level: _Level) -> tuple[TrainingConfig, str] | str:
        """The next config and why, or why to stop."""
        best = self.best(level)
        if best is None:
            self.rule_out(level)
        for config in self.fits_of(level):
            self.spare(level, config)
        while True:
            open_configs = self.open_configs(level)
            if not open_configs:
                return "every config that may fit was measured" if best else _NOTHING
            believed = self.believed(level, open_configs)
            if best is None:
                found = self.safest(level, open_configs, believed.mean)
            else:
                found = self.most_gained(level, open_configs, believed, best)
            if found is not None:
                return found

    def safest(
        self, level: _Level, configs: Sequence[TrainingConfig], means: Vector
    ) -> tuple[TrainingConfig, str] | str | None:
        """Nothing fits yet: the fastest that surely does, or the most likely one. None: something new was traced."""
        chances: dict[TrainingConfig, float] = {}
        for place in np.argsort(means, kind="stable"):
            config = configs[int(place)]
            if config in level.out:
                continue
            if config not in level.seconds:
                if self.may_fit(level, config) and self.trace_class(level, config):
                    return None
                continue
            if self.is_spared(level, config):
                continue
            chances[config] = self.chance(level, config)
            if chances[config] >= SAFE and self.retries(level, config) < RISKY:
                return config, f"predicted fastest of those that fit ({len(configs)} in question)"
        if not chances:
            return _NOTHING
        likeliest = max(chances, key=lambda config: chances[config])
        if chances[likeliest] < WORTH_A_TRY:
            return _NOTHING
        sure = next((config for config, chance in chances.items() if chance >= SAFE), None)
        if sure is not None:
            return sure, "predicted fastest of those that fit, if only by giving cached memory back"
        return likeliest, f"the most likely to fit ({chances[likeliest]:.0%})"

    def may_fit(self, level: _Level, config: TrainingConfig) -> bool:
        """Whether it may, as far as those say that surely need no more."""
        if any(needs_at_least(config, other) for other in self.beyond):
            self.hopeless.add(config)
            return False
        if any(seen.out_of_memory and needs_at_least(config, other) for other, seen in self.seen.items()):
            level.out.add(config)
            return False
        return True

    def most_gained(
        self,
        level: _Level,
        configs: Sequence[TrainingConfig],
        believed: Believed,
        best: tuple[TrainingConfig, float],
    ) -> tuple[TrainingConfig, str] | str | None:
        """The config with most expected gain a second. None: something new was traced."""
        means = believed.mean
        gains = expected_gains(believed, best[1])
        slowed = expected_gains(believed, best[1] - RETRIES_COST)
        costs = np.array([self.cost(level, config, mean) for config, mean in zip(configs, means, strict=True)])
        scores = gains / costs
        found: tuple[float, TrainingConfig, float, float] | None = None
        most = 0.0
        enough = self.tolerance * len(self.seen) / PATIENCE
        for place in np.argsort(-scores, kind="stable"):
            place = int(place)
            config = configs[place]
            if gains[place] < enough or (found is not None and scores[place] <= found[0]):
                most = max(most, float(gains[place]) if found is None else 0.0)
                continue
            if config in level.out:
                continue
            if config not in level.seconds:
                wanted = gains[place] >= max(enough, self.tolerance / 2)  # a dry run takes as long as a short probe
                if wanted and self.may_fit(level, config) and self.trace_class(level, config):
                    return None
                continue
            chance = 0.0 if self.is_spared(level, config) else self.chance(level, config)
            if chance < LIKELY:
                continue
            late = self.retries(level, config)
            gain = chance * float((1 - late) * gains[place] + late * slowed[place])
            most = max(most, gain)
            score = gain / costs[place]
            if gain >= enough and (found is None or score > found[0]):
                found = (score, config, gain, float(best[1] - means[place]))
        if found is None:
            return f"no other config is expected to gain {enough:.1%} (at most {most:.1%})"
        _, config, gain, lead = found
        return config, f"{lead:+.1%} of speed predicted, {gain:.1%} expected gain"

    def trace_class(self, level: _Level, config: TrainingConfig) -> bool:
        """Trace the settings of `config`, for one sample and for several; all that this predicts is taken.

        False where it cannot be predicted, and is left out.
        """
        alike = level.alike[settings_key(config)]
        self.predictor.prepare([config, *[o for o in alike if trace_key(o) != trace_key(config)][:1]])
        if not self.trace(level, config):
            return False
        for other in alike:
            if other not in level.seconds and other not in level.out and self.predictor.at_hand(other):
                self.trace(level, other)
        self.bound(level)
        return True

    def open_configs(self, level: _Level) -> list[TrainingConfig]:
        return [
            config
            for config in level.configs
            if config not in self.seen
            and config not in level.out
            and config not in self.hopeless
            and config not in self.spared
            and (config in level.seconds or config in level.bounds)
        ]

    def believed(self, level: _Level, configs: Sequence[TrainingConfig]) -> Believed:
        """Of the logarithm of seconds per token."""
        seconds = [level.seconds.get(config) or level.bounds[config] for config in configs]
        totals = [sum(one.values()) for one in seconds]
        shares = [{kind: s / total for kind, s in one.items()} for one, total in zip(seconds, totals, strict=True)]
        found = self.time.of(configs, shares)
        plain = [math.log(total / self.tokens(c)) for c, total in zip(configs, totals, strict=True)]
        return replace(found, means=found.means + np.asarray(plain))

    def best(self, level: _Level) -> tuple[TrainingConfig, float] | None:
        """The fastest measured at this level, and the logarithm of its believed seconds per token."""
        fits = self.fits_of(level)
        if not fits:
            return None
        means, _ = self.posterior(level, fits)
        place = int(np.argmin(means))
        return fits[place], float(means[place])

    def posterior(self, level: _Level, fits: Sequence[TrainingConfig]) -> tuple[Vector, Vector]:
        """(mean, deviation) of measured configs: what the model makes of the measurement, which noise moves less."""
        known = [config for config in fits if self.trace(level, config)]
        found = {c: (-math.log(max(self.seen[c].speed, 1e-9)), noise_of(self.seen[c].times_s)) for c in fits}
        if known:
            believed = self.believed(level, known)
            found |= dict(zip(known, zip(believed.mean, believed.deviations, strict=True), strict=True))
        return np.array([found[c][0] for c in fits]), np.array([found[c][1] for c in fits])

    def expected_memory(self, level: _Level, config: TrainingConfig) -> Prediction | None:
        if config not in level.memory:
            expected = self.predictor.expect(config)
            if expected is None:
                level.out.add(config)
                return None
            level.memory[config] = expected
        return level.memory[config]

    def chance(self, level: _Level, config: TrainingConfig) -> float:
        """Probability that it fits. One that surely needs as much as one that is hopeless has none."""
        if not self.may_fit(level, config):
            return 0.0
        expected = self.expected_memory(level, config)
        if expected is None:
            return 0.0
        if self.memory is None:
            return 1.0
        chance = self.memory.fits(config, needed_bytes(expected), expected.peak_allocated_bytes)
        if chance < HOPELESS:
            self.hopeless.add(config)
            self.beyond.append(config)
        elif chance >= SAFE:
            self.spare(level, config)
        return chance

    def is_spared(self, level: _Level, config: TrainingConfig) -> bool:
        """Whether a plainer config that runs the same kernels fits as well."""
        if _last_resorts(config):
            for other in level.alike_but_resorts[without_resorts(config)]:
                if _last_resorts(other) < _last_resorts(config) and other in level.seconds and other not in level.out:
                    self.chance(level, other)
        return config in self.spared

    def spare(self, level: _Level, config: TrainingConfig) -> None:
        """Leave out what only saves memory that is not needed: it runs the same kernels."""
        alike = [other for other in level.alike_but_resorts[without_resorts(config)] if other != config]
        if self.retries(level, config) > RISKY:
            alike = [other for other in alike if _last_resorts(other) < _last_resorts(config)]
        elif config not in self.seen:
            alike = [other for other in alike if _last_resorts(other) >= _last_resorts(config)]
        self.spared.update(alike)

    def retries(self, level: _Level, config: TrainingConfig) -> float:
        """Probability that what the allocator would keep does not fit, and it has to give its cache back."""
        expected = self.expected_memory(level, config)
        return self.retries_of(config, expected) if expected else 0.0

    def retries_of(self, config: TrainingConfig, expected: Prediction) -> float:
        if expected.device_used_bytes is None or self.memory is None:
            return 0.0
        needed = needed_bytes(expected)
        return 1.0 - self.memory.fits(
            config, needed, expected.peak_allocated_bytes, float(expected.device_used_bytes) - needed
        )

    def cost(self, level: _Level, config: TrainingConfig, mean: float) -> float:
        """Seconds that a probe of this config is expected to take."""
        start = statistics.median(self.starts) if self.starts else _START_S.get(self.device.kind, _USUAL_START_S)
        micro = math.exp(mean) * self.tokens(config) / config.gradient_accumulation_steps
        return start + _MICRO_BATCHES * micro

    def outcome(self, level: _Level, stopped: str) -> Outcome:
        """Best first; ties are those that the remaining doubt does not tell from the best."""
        observed = list(self.seen.values())
        fits, hopeless = self.fits_of(level), len(self.hopeless)
        if not fits:
            failed = [item for item in observed if item.out_of_memory]
            closest = failed[-1] if failed else None
            return Outcome(ranked=(), ties=(), stopped=stopped, closest=closest, hopeless=hopeless)
        found, deviations = self.posterior(level, fits)
        means = dict(zip(fits, found, strict=True))
        left, ranked = sorted(fits, key=lambda config: means[config]), []
        while left:
            ties = [config for config in left if means[config] <= means[left[0]] + LESS_MEMORY]
            ranked.append(min(ties, key=lambda c: (self.seen[c].peak_bytes is None, self.seen[c].peak_bytes or 0)))
            left.remove(ranked[-1])
        first = self.seen[ranked[0]]
        noise = max(self.tolerance, noise_of(first.times_s))
        ties = [c for c in ranked[1:] if abs(means[c] - means[ranked[0]]) <= noise]
        return Outcome(
            ranked=tuple(self.seen[config] for config in ranked),
            ties=tuple(self.seen[config] for config in ties),
            stopped=stopped,
            closest=None,
            hopeless=hopeless,
            believed={c: (float(means[c]), float(sd)) for c, sd in zip(fits, deviations, strict=True)},
        )


_NOTHING = "nothing fits: every config that is allowed is predicted or was seen not to fit"


def _last_resorts(config: TrainingConfig) -> int:
    """How many settings it has that only save memory: the driver's paging, segments that grow."""
    return config.optimizer.startswith("paged_") + (config.allocator is not AllocatorSetting.DEFAULT)


def without_resorts(config: TrainingConfig) -> TrainingConfig:
    """`config` with the plain form of those settings: one for all that run the same kernels."""
    optimizer = config.optimizer.removeprefix("paged_")
    return replace(config, allocator=AllocatorSetting.DEFAULT, optimizer=_PLAIN.get(optimizer, optimizer))


#: transformers' names of one optimizer's implementations, without "paged_".
_PLAIN = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_32bit": "adamw", "adamw_bnb_8bit": "adamw_8bit"}


def settings_key(config: TrainingConfig) -> tuple[object, ...]:
    """All of a config but its sizes: what decides which trace it has."""
    return tuple(getattr(config, name) for name in _TRACED)


def trace_key(config: TrainingConfig) -> tuple[object, ...]:
    """The same, and whether one sample is taken at once, which has a trace of its own."""
    return (*settings_key(config), config.micro_batch_size == 1)


_TRACED = (
    *("gradient_checkpointing", "attention", "optimizer", "loss", "quantization", "double_quant", "upcast"),
    *("lora_rank", "target_modules", "packing"),
)


def _sizes(config: TrainingConfig) -> tuple[object, ...]:
    return (config.micro_batch_size, config.sequence_length, config.attention, config.packing)


def is_no_slower(one: TrainingConfig, other: TrainingConfig) -> bool:
    """Whether `one`, of the same sizes, surely does no more work than `other`: by what their settings add."""
    plain = LossPath.LIGER not in (one.loss, other.loss) or one.loss is other.loss
    return plain and all(a <= b for a, b in zip(_work(one), _work(other), strict=True))


def quickest(level: _Level, like: TrainingConfig) -> TrainingConfig:
    """Of that micro batch size the config that recomputes nothing; of those in the level the nearest to it."""
    same = [c for c in level.configs if c.micro_batch_size == like.micro_batch_size]
    return min(same, key=_work)


def smallest(level: _Level, like: TrainingConfig) -> TrainingConfig:
    """Of that micro batch size the config with every layer checkpointed and the loss in chunks."""
    same = [c for c in level.configs if c.micro_batch_size == like.micro_batch_size]
    return min(same, key=_kept)


def _work(config: TrainingConfig) -> tuple[int, ...]:
    return (
        -kept_layers(config.gradient_checkpointing),
        int(config.loss is not LossPath.FULL),
        int(config.upcast is not Upcast.NONE),
        int(config.optimizer.startswith("paged")),
        int(config.allocator is not AllocatorSetting.DEFAULT),
        int(config.packing),
    )


def _kept(config: TrainingConfig) -> tuple[int, ...]:
    checkpointed = {"full": 0, "offload": 1, "off": 100}.get(config.gradient_checkpointing, 50)
    return (
        checkpointed,
        int(config.loss is not LossPath.CHUNKED),
        int(config.upcast is not Upcast.NONE),
        int(config.optimizer.startswith("paged")),
        int(config.allocator is not AllocatorSetting.DEFAULT),
        int(config.packing),
    )
