"""The next config of a run that ran out of device memory: the fastest expected to fit, measured ones first. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from autotune.protocols import Predictor
from autotune.recover.expected import (
    Expected,
    Measured,
    died_in_trials,
    needs_as_much,
    tokens_of,
    trial_that_fits,
)
from autotune.recover.facts import Ended, Settings
from autotune.recover.longest import batch_of_death, config_of, died_with, longest_batch
from autotune.search.dimensions import divisors, samples_of_one_gpu
from autotune.search.space import kept_layers
from autotune.values import AllocatorSetting, Device, Judgement, TrainingConfig, TrialRecord

BLIND = 2 / 3  # of the tokens that it died on, at most, where nothing else says how large the step must be
_CHECKPOINTING = ("off", "every_2", "every_3", "every_4", "full", "offload")
_LADDER = ("every_2", "full", "offload")  # as the ladder takes them, after every smaller micro batch
_SEGMENT_BYTES = 20 * 2**20  # by which a CUDA message's "tried to allocate" may exceed what was asked for

Source = Literal["measured", "predicted", "ladder", "closest"]
Can = Callable[[str, Any], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDown:
    """A config to go on with."""

    config: TrainingConfig  # at the length that it has memory for
    change: dict[str, Any]  # from the settings that died
    source: Source  # how it was found; "closest": not expected to fit, and the last that may
    covers_longest: bool  # it has memory for the longest batch that the run can meet, as far as that is known
    needed_bytes: int | None = None
    step_time_s: float | None = None  # of an optimizer step of longest batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """No config is left that could fit."""

    why: str
    missing_bytes: int | None = None  # to the smallest of them; None: not known


def next_config(
    settings: Settings,
    ended: Ended,
    judgement: Judgement,
    *,
    can: Can,
    device: Device,
    allowed_bytes: int | None,
    trials: Sequence[TrialRecord] = (),
    predictor: Predictor | None = None,
    base: TrainingConfig | None = None,
    died: Sequence[TrainingConfig] = (),
    allocator: AllocatorSetting = AllocatorSetting.DEFAULT,
) -> StepDown | Nothing:
    """What to go on with after `ended`, at the same effective batch size and by exact moves alone.

    `can(name, value)` says whether the command can be told a setting. `allowed_bytes` is in the predictor's terms
    (`Prediction.device_used_bytes`); None: the predictor's own. `trials` are of this model, device and software.
    `base` fills in what the command does not say; without a model there is neither it nor a predictor. `died` are the
    configs of this run's earlier deaths (`longest.died_earlier`). Raises what the predictor raises.
    """
    tokens = longest_batch(settings, ended.progress, batch_of_death(ended))
    now = _current(settings, ended, base, tokens, allocator)
    if now is None:
        return Nothing(why="its micro batch size is not known, so nothing can be made smaller")
    search = _Search(now, settings, ended, judgement, can, device, allowed_bytes, trials, predictor, died)
    lengths = [now.sequence_length]
    if search.died[-1].sequence_length < now.sequence_length:
        lengths.append(search.died[-1].sequence_length)  # rather the batch at hand than no next attempt at all
    for length in lengths:
        found = search.at(length)
        if found is not None:
            return replace(found, covers_longest=length == now.sequence_length)
    return search.closest() or search.nothing()


def _current(
    settings: Settings,
    ended: Ended,
    base: TrainingConfig | None,
    tokens: int | None,
    allocator: AllocatorSetting,
) -> TrainingConfig | None:
    """The config that died, at the longest batch that it can meet."""
    known = config_of(settings, ended.progress, tokens=tokens)
    if known is None or base is None:
        return None if known is None else replace(known, allocator=allocator)
    return replace(
        base,
        sequence_length=known.sequence_length,
        micro_batch_size=known.micro_batch_size,
        gradient_accumulation_steps=known.gradient_accumulation_steps,
        world_size=known.world_size,
        eval_micro_batch_size=known.eval_micro_batch_size,
        gradient_checkpointing=known.gradient_checkpointing,
        allocator=allocator,
    )


class _Search:
    """One death's candidates."""

    def __init__(
        self,
        now: TrainingConfig,
        settings: Settings,
        ended: Ended,
        judgement: Judgement,
        can: Can,
        device: Device,
        allowed_bytes: int | None,
        trials: Sequence[TrialRecord],
        predictor: Predictor | None,
        died: Sequence[TrainingConfig],
    ) -> None:
        self.now, self.settings, self.can, self.device, self.trials = now, settings, can, device, trials
        self.on_cpu = device.kind == "cpu"
        self.numbers = judgement.numbers
        here = died_with(now, batch_of_death(ended))
        length_known = longest_batch(settings, ended.progress, batch_of_death(ended)) is not None
        self.predictor = predictor if length_known else None
        measured = Measured(
            died=here,
            fitted=_fitted(now, ended),
            fitted_bytes=self.peak(ended),
            wanted_bytes=self._wanted(ended),
        )
        self.expected = Expected(self.predictor, allowed_bytes, measured, on_cpu=self.on_cpu)
        allowed = self.expected.allowed_bytes
        earlier = [replace(now, **_moved(config)) for config in died]  # of this run: only what it moves differs
        self.died = [*died_in_trials(trials, allowed), *earlier, here]

    def at(self, length: int) -> StepDown | None:
        """The best at this length: measured before predicted before the ladder's next."""
        candidates = [config for config in self.candidates(length) if self.may_fit(config)]
        found = self.measured(candidates) or self.predicted(candidates)
        if found is None and not any(self.expected.prediction(config) for config in _smallest(candidates)):
            found = self.next_on_ladder(candidates)
        return found

    def candidates(self, length: int) -> Iterator[TrainingConfig]:
        """Every config that the command can be told, at the same effective batch size."""
        now, samples = replace(self.now, sequence_length=length), samples_of_one_gpu(self.now)
        sizes = [size for size in reversed(divisors(samples)) if self.can_size(size, samples // size)]
        kinds = dict.fromkeys([now.gradient_checkpointing, *_CHECKPOINTING])
        for kind in kinds:
            if kind != now.gradient_checkpointing and not self.can_checkpoint(kind):
                continue
            saves = kept_layers(kind) < kept_layers(now.gradient_checkpointing)
            for size in sizes:
                if size > now.micro_batch_size and not saves:
                    continue
                evaluated = now.eval_micro_batch_size
                yield replace(
                    now,
                    micro_batch_size=size,
                    gradient_accumulation_steps=samples // size,
                    gradient_checkpointing=kind,
                    eval_micro_batch_size=None if evaluated is None else min(evaluated, size),
                    allocator=self.allocator,
                )

    def can_size(self, size: int, steps: int) -> bool:
        if size == self.now.micro_batch_size:
            return True
        return self.can("micro_batch_size", size) and self.can("gradient_accumulation_steps", steps)

    def can_checkpoint(self, kind: str) -> bool:
        possible = kind != "offload" or not (self.on_cpu or self.device.unified_memory)
        return possible and self.can("gradient_checkpointing", kind)

    @property
    def allocator(self) -> AllocatorSetting:
        """Segments that can grow cost nothing measurable, so every candidate has them where they work."""
        works = self.device.kind in ("cuda", "rocm") and not self.device.wsl and not self.device.virtual
        grows = AllocatorSetting.EXPANDABLE_SEGMENTS
        return grows if works and self.can("allocator", grows.value) else self.now.allocator

    def may_fit(self, config: TrainingConfig) -> bool:
        """Whether it takes less than each that ran out of memory; another allocator counts where memory lay idle."""
        plain = config if self.lies_idle else replace(config, allocator=self.now.allocator)
        return not any(needs_as_much(plain, replace(died, allocator=self.now.allocator)) for died in self.died)

    @property
    def lies_idle(self) -> bool:
        """Whether the allocator held more than was asked for and could not give it: memory was in pieces."""
        idle, tried = (self.numbers.get(f"{name}_bytes") for name in ("reserved_unallocated", "tried"))
        return bool(idle and tried and idle >= tried)

    def measured(self, candidates: Sequence[TrainingConfig]) -> StepDown | None:
        """The fastest of those that a stored trial, or this run itself, has shown to fit."""
        found = []
        for config in candidates:
            trial = trial_that_fits(config, self.trials, self.expected.allowed_bytes, on_cpu=self.on_cpu)
            passed = self.expected.has_passed(config)
            if not passed and (trial is None or self.expected.fits(config, margin=0) is False):
                continue
            seconds = _seconds_of(trial, config) if trial else None
            found.append(self.offer(config, "measured", seconds))
        return min(found, key=_quickest, default=None)

    def predicted(self, candidates: Sequence[TrainingConfig]) -> StepDown | None:
        """Of each micro batch size what recomputes least and fits, and of those the fastest.

        A dry run takes seconds: what recomputes more is slower and needs less, so few of them decide.
        """
        if self.predictor is None:
            return None
        sizes: dict[int, list[TrainingConfig]] = {}
        for config in sorted(candidates, key=lambda one: -kept_layers(one.gradient_checkpointing)):
            sizes.setdefault(config.micro_batch_size, []).append(config)
        found = []
        lightest = -1
        for size in sorted(sizes, reverse=True):
            kinds = [config for config in sizes[size] if kept_layers(config.gradient_checkpointing) > lightest]
            place = bisect.bisect_left(kinds, True, key=lambda config: bool(self.expected.fits(config)))
            if place < len(kinds):
                found.append(self.offer(kinds[place], "predicted"))
                lightest = kept_layers(kinds[place].gradient_checkpointing)  # a smaller one must recompute less
        return min(found, key=_quickest, default=None)

    def next_on_ladder(self, candidates: Sequence[TrainingConfig]) -> StepDown | None:
        """Nothing is predicted: the next smaller micro batch that is a real step, then more checkpointing."""
        died = self.died[-1]
        same = [config for config in candidates if config.gradient_checkpointing == self.now.gradient_checkpointing]
        smaller = [config for config in same if self.expected.fits(config) is not False]  # largest first
        real = [config for config in smaller if tokens_of(config) <= BLIND * tokens_of(died)]
        idle = [config for config in smaller if self.lies_idle and tokens_of(config) >= tokens_of(died)]
        rungs = [kind for kind in _LADDER if kept_layers(kind) < kept_layers(self.now.gradient_checkpointing)]
        deeper = [config for kind in rungs for config in reversed(candidates) if config.gradient_checkpointing == kind]
        chosen = next(iter([*idle[:1], *real, *reversed(smaller), *deeper]), None)
        return None if chosen is None else self.offer(chosen, "ladder")

    def closest(self) -> StepDown | None:
        """The one that needs least, though it is not expected to fit: predictions err, and a try costs minutes."""
        length = self.died[-1].sequence_length
        candidates = _smallest([config for config in self.candidates(length) if self.may_fit(config)])
        hopeful = [config for config in candidates if self.predictor is None or not self.predictor.hopeless(config)]
        needs = [(self.expected.need(config) or 0.0, place) for place, config in enumerate(hopeful)]
        return self.offer(hopeful[min(needs)[1]], "closest") if needs else None

    def nothing(self) -> Nothing:
        length = min(self.now.sequence_length, self.died[-1].sequence_length)
        least = _smallest(list(self.candidates(length)))
        needs = [need for config in least if (need := self.expected.need(config)) is not None]
        allowed = self.expected.allowed_bytes
        missing = round(min(needs) - allowed) if needs and allowed is not None else None
        return Nothing(
            why="no config that this command can be told, at the same effective batch size, needs less memory",
            missing_bytes=missing if missing is not None and missing > 0 else None,
        )

    def offer(self, config: TrainingConfig, source: Source, seconds: float | None = None) -> StepDown:
        found, need = self.expected.prediction(config), self.expected.need(config)
        return StepDown(
            config=config,
            change=self.change(config),
            source=source,
            covers_longest=False,
            needed_bytes=None if need is None else round(need),
            step_time_s=seconds if seconds is not None else found.step_time_s if found else None,
        )

    def change(self, config: TrainingConfig) -> dict[str, Any]:
        """What differs from the config that died, in plain values."""
        names = ["micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "allocator"]
        evaluated = config.eval_micro_batch_size
        if evaluated is not None and self.can("eval_micro_batch_size", evaluated):
            names.append("eval_micro_batch_size")
        pairs = {name: (getattr(self.now, name), getattr(config, name)) for name in names}
        return {
            name: new.value if isinstance(new, AllocatorSetting) else new
            for name, (old, new) in pairs.items()
            if old != new
        }

    def peak(self, ended: Ended) -> int | None:
        """Of the steps that passed, in what the limit is compared with: live tensors; on the CPU all data (VmData)."""
        return ended.progress.peak_reserved_bytes if self.on_cpu else ended.progress.peak_allocated_bytes

    def _wanted(self, ended: Ended) -> int | None:
        """Held and asked for at the death: what it needed, at least."""
        tried, allocated = self.numbers.get("tried_bytes"), self.numbers.get("allocated_bytes")
        if self.on_cpu:
            allocated = self.peak(ended)
        if tried is None or allocated is None:
            return None
        return allocated + tried - (0 if self.on_cpu else _SEGMENT_BYTES)


def _smallest(candidates: Sequence[TrainingConfig]) -> list[TrainingConfig]:
    """Of the smallest micro batch: the plainest settings, and those that keep least."""
    size = min((config.micro_batch_size for config in candidates), default=0)
    found = [config for config in candidates if config.micro_batch_size == size]
    ends = found[:1] + sorted(found, key=lambda config: kept_layers(config.gradient_checkpointing))[:1]
    return list(dict.fromkeys(ends))


def _moved(config: TrainingConfig) -> dict[str, Any]:
    """What recoveries change of memory; the allocator is compared apart."""
    names = ("micro_batch_size", "sequence_length", "gradient_checkpointing")
    return {name: getattr(config, name) for name in names}


def _fitted(now: TrainingConfig, ended: Ended) -> TrainingConfig | None:
    seen = ended.progress.longest_seen
    return None if seen is None else died_with(now, seen)


def _seconds_of(trial: TrialRecord, config: TrainingConfig) -> float | None:
    """Of an optimizer step of `config`, by a trial of the same settings: as many seconds a token."""
    step = trial.report.step_time_s(trial.config.gradient_accumulation_steps)
    if not step:
        return None
    tokens = trial.config.gradient_accumulation_steps * tokens_of(trial.config)
    return step / tokens * config.gradient_accumulation_steps * tokens_of(config)


def _quickest(found: StepDown) -> tuple[float, int, int]:
    """By time; where that is not known the larger micro batch, then the fewer layers run twice."""
    config = found.config
    return (
        found.step_time_s if found.step_time_s is not None else float("inf"),
        -config.micro_batch_size,
        -kept_layers(config.gradient_checkpointing),
    )
