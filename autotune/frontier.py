"""The fastest config at each sequence length: measured where it was probed, predicted elsewhere. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from autotune.mix import tokens_per_row
from autotune.protocols import Predictor
from autotune.search.belief import CPU_DOUBT, GPU_DOUBT, MemoryBelief, TimeBelief, noise_of, shares_of
from autotune.search.quickest import families
from autotune.search.space import SearchSpace, needs_at_least
from autotune.values import (
    Attention,
    Device,
    FitRequest,
    FrontierRow,
    LossPath,
    Origin,
    Prediction,
    ProbeReport,
    Recommendation,
    TrainingConfig,
    TrialRecord,
    Verdict,
)

BUDGET_S = 3.0  # of predictions
KNOWN_BUDGET_S = 2.0  # for an answer from the database, which is there at once
FAR = 1.1  # times what is allowed: a memory guessed from other sizes above it is predicted last
LONGEST = 131_072  # tokens, of a model whose config does not say
TAUGHT_BY = 60  # trials, the newest
_OUT_OF_MEMORY = (Verdict.DEVICE_OOM, Verdict.SPILL)
_SAME_LIMIT = 0.98  # of the allocator's limit, which moves with the context measured


def lengths_of(request: FitRequest, device: Device) -> tuple[int, ...]:
    """512, 1,024, … (on the CPU from 64) up to the model's limit, and the length asked for: that one and the nearest
    first. A dataset's lengths are known up to the one asked for."""
    wanted, longest = request.start.sequence_length, request.model.max_positions
    if request.lengths is not None:
        longest = wanted
    found = {wanted} if longest is None else {wanted, longest}
    length = 64 if device.kind == "cpu" else 512
    while length <= (longest or LONGEST):
        found.add(length)
        length *= 2
    return tuple(sorted(found, key=lambda tokens: (abs(math.log2(tokens / wanted)), tokens)))


def candidates_of(space: SearchSpace, trials: Sequence[TrialRecord]) -> tuple[TrainingConfig, ...]:
    """Configs at the length asked for: the settings tried and the plain ones, at every micro batch size."""
    wanted = space.request.start
    tried = [replace(trial.config, sequence_length=wanted.sequence_length) for trial in trials]
    best = max(trials, key=lambda trial: trial.tokens_per_second or 0.0, default=None)
    bases = (
        [space.start] if best is None else [replace(best.config, sequence_length=wanted.sequence_length), space.start]
    )
    plain = [family[0] for base in bases for family in families(base)]
    partly = [replace(config, gradient_checkpointing="every_2") for config in plain]
    alike = [config for config in (*tried, *plain, *partly) if config.packing == wanted.packing]  # else rows change too
    sized = [space.resize(config, size) for config in dict.fromkeys(alike) for size in space.micro_batch_sizes]
    return tuple(config for config in dict.fromkeys(sized) if space.legal(config) is None)


def frontier(
    result: Recommendation,
    stored: Iterable[TrialRecord],
    candidates: Sequence[TrainingConfig],
    predictor: Predictor | None,
    *,
    monotonic: Callable[[], float],
    budget_s: float = BUDGET_S,
) -> tuple[tuple[FrontierRow, ...], tuple[str, ...]]:
    """(rows by length up to the first where nothing fits, what was left out in words).

    `stored` are trials of the device, `candidates` configs at the length asked for. Nothing new is traced.
    Raises `Interrupted`.
    """
    until = monotonic() + budget_s

    def late() -> bool:
        return monotonic() >= until

    trials = comparable(result, stored)
    known = None
    if predictor is not None and predictor.allowed_bytes is not None:
        known = _Expected(predictor, predictor.allowed_bytes, candidates, trials, result, late)
    rows: dict[int, FrontierRow] = {}
    missed: dict[bool, list[int]] = {True: [], False: []}  # by whether there was no time left
    for length in lengths_of(result.request, result.device):
        row = measured_at(length, result, trials, candidates)
        if row is None and known is not None and length < _first_unfit(rows):
            row = known.at(length)
            if row is None:
                missed[late()].append(length)
        if row is not None:
            rows[length] = row
    end = _first_unfit(rows)
    shown = tuple(rows[length] for length in sorted(rows) if rows[length].fits or length == end)
    return shown, tuple(_left_out(missed, end, budget_s))


def _first_unfit(rows: Mapping[int, FrontierRow]) -> float:
    """The shortest length at which nothing fits; infinite where there is none."""
    return min((length for length, row in rows.items() if not row.fits), default=math.inf)


def _left_out(missed: Mapping[bool, Sequence[int]], end: float, budget_s: float) -> Iterable[str]:
    reasons = {True: f"predicting takes more than {budget_s:g} s", False: "no dry run at hand says what fits"}
    for is_late, why in reasons.items():
        lengths = [f"{length:,}" for length in sorted(missed[is_late]) if length < end]
        if lengths:
            yield f"{', '.join(lengths)} tokens were left out of the lengths: {why}"


def comparable(result: Recommendation, stored: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials under this fit's conditions, oldest first: model, device, software, limit. Its own come last."""
    if not result.trials:
        return []
    own, last = set(map(id_of, result.trials)), result.trials[-1]
    here = (last.model_fingerprint, last.device_slug, last.memory_limit_bytes, last.environment.fingerprint)

    def alike(trial: TrialRecord) -> bool:
        theirs = (trial.model_fingerprint, trial.device_slug, trial.memory_limit_bytes, trial.environment.fingerprint)
        is_other = trial.origin is not Origin.DATABASE and id_of(trial) not in own
        return theirs == here and is_other and counts_the_same(trial)

    mix = result.request.lengths

    def counts_the_same(trial: TrialRecord) -> bool:
        """Whether its tokens are of the same dataset's rows, or of full ones as this fit's are."""
        counted, expected = trial.report.tokens_per_sample, tokens_per_row(trial.config, mix) if mix else None
        return counted == expected or bool(counted and expected and math.isclose(counted, expected, rel_tol=1e-6))

    limit = max((trial.report.limit_bytes or 0 for trial in result.trials), default=0)
    found = [trial for trial in [*filter(alike, stored), *result.trials] if _says_something(trial, limit)]
    died = [t.config for t in found if t.origin is Origin.RUN and t.judgement.verdict in _OUT_OF_MEMORY]
    return [trial for trial in found if not (_fits(trial) and any(needs_at_least(trial.config, d) for d in died))]


def _fits(trial: TrialRecord) -> bool:
    return trial.judgement.verdict is Verdict.FITS


def id_of(trial: TrialRecord) -> object:
    """What tells two rows apart."""
    return trial.id if trial.id is not None else (trial.config, trial.origin, trial.time_utc)


def _says_something(trial: TrialRecord, limit: int) -> bool:
    """Whether it fits, or ran out of memory, under this fit's limit too; headroom may have been another."""
    if trial.judgement.verdict is Verdict.FITS:
        return not limit or (trial.report.peak_reserved_bytes or 0) <= limit
    return trial.judgement.verdict in _OUT_OF_MEMORY and (trial.report.limit_bytes or 0) >= _SAME_LIMIT * limit


def measured_at(
    length: int, result: Recommendation, trials: Sequence[TrialRecord], candidates: Sequence[TrainingConfig]
) -> FrontierRow | None:
    """The proof at this length, of several the newest; else the fastest probe. None: nothing fitted there."""
    if result.proof is not None and result.proof.config.sequence_length == length:
        return _row_of(result.proof, result.device)
    wanted, legal = result.request.start.sequence_length, set(candidates)
    fits = [
        trial
        for trial in trials
        if trial.config.sequence_length == length
        and trial.tokens_per_second is not None
        and replace(trial.config, sequence_length=wanted) in legal
    ]
    proofs = [trial for trial in fits if trial.origin is Origin.PROOF]
    best = proofs[-1] if proofs else max(fits, key=lambda trial: trial.tokens_per_second or 0.0, default=None)
    return None if best is None else _row_of(best, result.device)


def _row_of(trial: TrialRecord, device: Device) -> FrontierRow:
    return FrontierRow(
        config=trial.config,
        origin="measured",
        fits=True,
        tokens_per_second=trial.tokens_per_second,
        memory_bytes=_used_bytes(trial.report, device),
    )


def _used_bytes(report: ProbeReport, device: Device) -> int | None:
    return report.peak_reserved_bytes if device.kind == "cpu" else report.device_used_bytes


class _Expected:
    """Time and memory of configs that were not probed, corrected by those that were."""

    def __init__(
        self,
        predictor: Predictor,
        allowed_bytes: int,
        candidates: Sequence[TrainingConfig],
        trials: Sequence[TrialRecord],
        result: Recommendation,
        late: Callable[[], bool],
    ) -> None:
        self.predictor, self.allowed_bytes, self.candidates, self.late = predictor, allowed_bytes, candidates, late
        self.lengths, self.device = result.request.lengths, result.device
        doubt = CPU_DOUBT if self.device.kind == "cpu" else GPU_DOUBT
        self.time, self.memory = TimeBelief(doubt), MemoryBelief(doubt, float(allowed_bytes))
        self.unfit = [trial.config for trial in trials if trial.judgement.verdict in _OUT_OF_MEMORY]
        self.points: dict[TrainingConfig, dict[int, float]] = {}  # bytes needed by tokens of a micro batch, by settings
        for trial in trials[-TAUGHT_BY:]:
            self.learn(trial)

    def learn(self, trial: TrialRecord) -> None:
        """Take in what was measured beside what was predicted of it."""
        config, expected, report = trial.config, trial.prediction, trial.report
        fits = trial.judgement.verdict is Verdict.FITS
        step_s = report.step_time_s(config.gradient_accumulation_steps)
        if fits and step_s and (seconds := self.seconds(config, expected)):
            self.time.observe(config, seconds, step_s, noise_of(report.micro_batch_times_s))
        if expected is None or not expected.memory_factor:
            return
        whole = expected.peak_allocated_bytes
        peak = whole if trial.origin is Origin.PROOF else expected.training_peak_allocated_bytes or whole
        tensors = peak / expected.memory_factor
        on_cpu, beside = self.device.kind == "cpu", _beside_bytes(expected)
        needed = tensors + beside
        measured = report.peak_reserved_bytes if on_cpu else report.peak_allocated_bytes  # a GPU's cache is given back
        if fits and measured:
            self.memory.observe(config, needed, tensors, measured + beside)
            self.note(config, measured + beside)
        elif not fits:
            self.memory.observe_at_least(config, needed, tensors, float(self.allowed_bytes))

    def seconds(self, config: TrainingConfig, expected: Prediction | None = None) -> Mapping[str, float] | None:
        """Of a step by kind, nothing learned in it; None where that would need a dry run."""
        if expected is not None and expected.seconds_by_kind:
            return expected.seconds_by_kind
        return (self.predictor.seconds(config) or None) if self.predictor.at_hand(config) else None

    def at(self, length: int) -> FrontierRow | None:
        """The fastest that is expected to fit, or the least where none is; None: not known, or out of time."""
        there = [replace(candidate, sequence_length=length) for candidate in self.candidates]
        there = [config for config in there if not self.is_unfit(config)]
        far = [config for config in there if self.is_far(config)]
        least: FrontierRow | None = None
        for config, step_s in self.quickest_first([config for config in there if not self.is_far(config)]):
            if self.late():
                return None
            if self.is_far(config):  # as was learned meanwhile
                far.append(config)
                continue
            row = self.row(config, step_s)
            if row is not None and row.fits:
                return row
            least = _smaller(least, row)
        nearest = min(far, key=lambda config: self.guess(config) or 0.0, default=None)
        for config, step_s in self.quickest_first([nearest] if nearest else []):  # the others are guessed to need more
            least = _smaller(least, self.row(config, step_s))
        return least if self.knows_least(length) else None

    def knows_least(self, length: int) -> bool:
        """Whether what takes least at this length was among what could be predicted, or is known not to fit."""
        few = min(map(_memory_order, self.candidates))
        smallest = [replace(c, sequence_length=length) for c in self.candidates if _memory_order(c) == few]
        return any(self.is_unfit(config) or self.predictor.at_hand(config) for config in smallest)

    def quickest_first(self, configs: Iterable[TrainingConfig]) -> list[tuple[TrainingConfig, float]]:
        """Those whose time can be predicted, with the seconds of a step that are believed."""
        found = {c: seconds for c in configs if not self.late() and (seconds := self.seconds(c))}
        if not found:
            return []
        means = self.time.of(list(found), [shares_of(seconds) for seconds in found.values()]).mean
        steps = [sum(seconds.values()) * math.exp(mean) for seconds, mean in zip(found.values(), means, strict=True)]
        return sorted(zip(found, steps, strict=True), key=lambda item: item[1])

    def is_unfit(self, config: TrainingConfig) -> bool:
        """Whether it surely needs as much as one that does not fit."""
        return any(needs_at_least(config, other) for other in self.unfit)

    def row(self, config: TrainingConfig, step_s: float) -> FrontierRow | None:
        """With its memory predicted, which takes time; None where it cannot be, or is known not to fit."""
        expected = None if self.is_unfit(config) else self.predictor.predict(config)
        if expected is None:
            return None
        factor = expected.memory_factor or 1.0
        tensors, reserved = (size / factor for size in _allocator_bytes(expected))
        needed = tensors + _beside_bytes(expected)
        fits = self.memory.fits(config, needed, tensors) >= 0.5
        self.note(config, self.memory.needs(config, needed, tensors)[0])
        held = needed + (reserved - tensors if fits else 0.0)  # with what the allocator caches
        used = self.memory.needs(config, held, tensors)[0]
        if not fits:
            self.unfit.append(config)
        tokens = tokens_per_row(config, self.lengths) if self.lengths else config.sequence_length
        return FrontierRow(
            config=config,
            origin="predicted",
            fits=fits,
            tokens_per_second=tokens * config.effective_batch_size / step_s if fits else None,
            memory_bytes=round(min(used, self.allowed_bytes) if fits else used),  # a cache is given back at the limit
        )

    def note(self, config: TrainingConfig, needed: float) -> None:
        """Keep what a config needs, for guesses of others."""
        self.points.setdefault(_settings(config), {})[config.micro_batch_size * config.sequence_length] = needed

    def is_far(self, config: TrainingConfig) -> bool:
        """Whether it is guessed to need far more than is allowed."""
        return (self.guess(config) or 0.0) > FAR * self.allowed_bytes

    def guess(self, config: TrainingConfig) -> float | None:
        """Bytes that it needs, in a straight line through the nearest sizes known of the same settings; of a single one
        and what others would need at no tokens."""
        points = self.points.get(_settings(config), {})
        if not points or config.attention is Attention.EAGER:  # whose memory grows with the length squared
            return None
        tokens = config.micro_batch_size * config.sequence_length
        nearest = sorted(points, key=lambda known: abs(math.log2(known / tokens)))[:2]
        if len(nearest) == 1:
            return self.on_line(tokens, (0, base), (nearest[0], points[nearest[0]])) if (base := self.base()) else None
        return self.on_line(tokens, *((known, points[known]) for known in nearest))

    def base(self) -> float | None:
        """The least that settings of two sizes known would need at no tokens."""
        ends = [(min(points.items()), max(points.items())) for points in self.points.values() if len(points) > 1]
        return min((self.on_line(0, *pair) for pair in ends), default=None)

    @staticmethod
    def on_line(tokens: int, one: tuple[int, float], other: tuple[int, float]) -> float:
        return one[1] + (tokens - one[0]) * (other[1] - one[1]) / (other[0] - one[0])


def _smaller(one: FrontierRow | None, other: FrontierRow | None) -> FrontierRow | None:
    """The row with less memory."""
    rows = [row for row in (one, other) if row is not None]
    return min(rows, key=lambda row: row.memory_bytes or 0, default=None)


def _settings(config: TrainingConfig) -> TrainingConfig:
    """A config with its sizes taken off."""
    return replace(config, micro_batch_size=1, gradient_accumulation_steps=1, sequence_length=1)


def _memory_order(config: TrainingConfig) -> tuple[int, bool, bool]:
    """Rising with the memory that the settings which matter most take."""
    keeps_layers = config.gradient_checkpointing not in ("full", "offload")
    return config.micro_batch_size, keeps_layers, config.loss is LossPath.FULL


def _allocator_bytes(expected: Prediction) -> tuple[int, int]:
    """(allocated, reserved) at the peak."""
    return expected.peak_allocated_bytes, expected.peak_reserved_bytes or expected.peak_allocated_bytes


def _beside_bytes(expected: Prediction) -> float:
    """On the device beside what the allocator holds: a context, other processes. None of it on the CPU."""
    if expected.device_used_bytes is None or expected.peak_reserved_bytes is None:
        return 0.0
    return float(expected.device_used_bytes - expected.peak_reserved_bytes)
