"""The flow: a request in, a proven recommendation out. Everything it needs is given to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autotune.errors import Interrupted, InvalidRequest, ProbeFailed
from autotune.mix import packed_line, packed_to_try, tokens_per_row, with_mix
from autotune.predict.learned import SEGMENT_BYTES
from autotune.protocols import Predictor, ProbeExecutor, TrialStore
from autotune.search.belief import noise_of
from autotune.search.climb import Observation, Outcome, Proposal, climb, conclude
from autotune.search.seek import Earlier, seek
from autotune.search.space import SearchSpace, build_space, needs_at_least
from autotune.search.study import Search
from autotune.values import (
    Device,
    Environment,
    FitRequest,
    FitStatus,
    Isolation,
    Judgement,
    Move,
    Origin,
    Prediction,
    ProbeReport,
    ProbeRequest,
    Recommendation,
    TrainingConfig,
    TrialRecord,
    Verdict,
    to_json,
)
from strategies import MemoryMove

LEAST_PROBE_S = 3.0  # a fresh process, its libraries imported, before any step
EARLIER = 60  # trials of other requests that a search learns from, the newest
PROOF_STEPS = 3  # optimizer steps: one to warm up; Adam's state is there in every later one
DISAGREEMENT = 1.3  # proof's speed ÷ probe's, either way, that is worth a warning
MOST_PROVEN = 2  # proofs that hold, where the first puts another config ahead
MAX_PROOFS = 4  # configs taken to a fresh worker before a fit gives up
_OUT_OF_MEMORY = (Verdict.DEVICE_OOM, Verdict.SPILL)
_RETRIED = (Verdict.AMBIGUOUS, Verdict.TIMEOUT, Verdict.DEVICE_LOST)


class Observer(Protocol):
    """Hears how a fit goes."""

    def trial_starts(self, config: TrainingConfig, reason: str, *, proof: bool) -> None: ...

    def trial_ends(self, trial: TrialRecord) -> None: ...

    def trial_skipped(self, config: TrainingConfig, prediction: Prediction) -> None: ...


class Judge(Protocol):
    """Says what a report means. `settle` starts before a probe and is called with what it gave."""

    def begin(self) -> None: ...

    def judge(self, report: ProbeReport, request: ProbeRequest) -> Judgement: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a search goes."""

    tolerance: float
    max_probes: int
    budget_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """What a fit is given instead of taking it."""

    executor: ProbeExecutor
    store: TrialStore
    judge: Judge
    observer: Observer
    now_utc: Callable[[], str]
    monotonic: Callable[[], float]
    predictor: Predictor | None = None  # None: nothing is predicted, everything is probed


def request_id(request: FitRequest, headroom_bytes: int) -> str:
    """Sixteen hex digits of all that changes the answer: two requests with the same are answered alike."""
    asked = {**to_json(request), "model": request.model.fingerprint, "headroom_bytes": headroom_bytes}
    del asked["isolation"]
    for name in ("lengths", "fixed", "excluded"):  # younger than the first stored requests, whose ids stay
        if not asked[name]:
            del asked[name]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def fit(
    request: FitRequest,
    device: Device,
    seams: Seams,
    *,
    ladder: Sequence[MemoryMove],
    installed: Collection[str] = (),
    headroom_bytes: int = 0,
    fresh: bool = False,
    max_probes: int = 24,
    tolerance: float = 0.01,
    budget_s: float | None = None,
) -> Recommendation:
    """The fastest config that fits, proven in a fresh worker; from the store where it is known already.

    `fresh` measures again, whatever the store holds. The search ends where no probe is expected to gain more than
    `tolerance` (a fraction of speed), after `max_probes`, or where another would not leave `budget_s` time for the
    proof. Raises `ProbeFailed` for a probe that dies of anything but memory, `Interrupted` when stopped (every
    finished trial is stored), `InvalidRequest` for a budget that one probe exceeds, `StoreError`.
    """
    run = _Fit(request, device, seams, ladder, headroom_bytes)
    if not fresh:
        known = run.known_answer()
        if known is not None:
            return known
    return run.search(Bounds(tolerance, max_probes, budget_s), installed, fresh=fresh)


class _Fit:
    """One fit's state: its trials so far."""

    def __init__(
        self, request: FitRequest, device: Device, seams: Seams, ladder: Sequence[MemoryMove], headroom_bytes: int
    ) -> None:
        self.request, self.device, self.seams, self.ladder = request, device, seams, ladder
        self.headroom_bytes = headroom_bytes
        self.id = request_id(request, headroom_bytes)
        self.environment: Environment = seams.executor.environment()
        self.began = seams.monotonic()
        self.stored = seams.store.trials(request_id=self.id)
        self.trials: list[TrialRecord] = []
        self.probes = 0
        self.skipped: dict[TrainingConfig, Prediction] = {}
        self._of_device: list[TrialRecord] | None = None
        self._deaths: list[TrialRecord] | None = None
        self.seeks = False  # with a search that knows what is predicted
        self.believes = True  # in predictions; not any more once one that was told not to fit did

    def known_answer(self) -> Recommendation | None:
        """From the store: at once where environment and free memory still allow it, else after one proving probe."""
        last = last_answer([trial for trial in self.stored if not self.is_refuted(trial)])
        if last is None:
            return None
        same = last.environment.fingerprint == self.environment.fingerprint
        if same and has_room(self.device, last, self.headroom_bytes):
            self.trials = [t for t in self.stored if t.environment.fingerprint == self.environment.fingerprint]
            return self.recommend(last, from_database=True, notes=(f"measured {last.time_utc}, known since",))
        if same:
            return None  # the card is fuller than then: search what fits now
        proof = self.measure(last.config, "known, but the software has changed: proven again", proof=True)
        if proof.judgement.verdict is Verdict.FITS:
            return self.recommend(proof, notes=("known config, proven again under other software versions",))
        return None

    def recorded(self) -> dict[TrainingConfig, Observation]:
        """What an earlier, perhaps interrupted fit of this request measured in this environment.

        Proofs that ran out of memory stay known too; one that held is taken again: the card may be fuller now.
        """
        same = [trial for trial in self.stored if trial.environment.fingerprint == self.environment.fingerprint]
        same = [trial for trial in same if not self.is_refuted(trial)]
        usable = {Origin.PROBE: (Verdict.FITS, *_OUT_OF_MEMORY), Origin.PROOF: _OUT_OF_MEMORY}
        known = [trial for trial in same if trial.judgement.verdict in usable.get(trial.origin, ())]
        self.trials = [*known, *self.trials]
        return {trial.config: self.observe(trial) for trial in known if trial.origin is Origin.PROBE}

    def search(self, bounds: Bounds, installed: Collection[str], *, fresh: bool) -> Recommendation:
        self.check_budget(bounds)
        space = build_space(self.request, self.device, installed=installed)
        recorded = {} if fresh else {**self.recorded(), **self.runs_died_with(space)}
        predictor = self.seams.predictor
        outcome = self.seek(space, predictor, bounds, recorded, fresh=fresh) if predictor else None
        if outcome is None:
            outcome = self.climb(space, bounds, recorded)
        notes = [*left_out(space), *self.refuted_line(fresh), *self.skipped_line(outcome), outcome.stopped]
        if outcome.ties:
            notes.append(f"{len(outcome.ties)} other config(s) as fast within noise; this one takes the least memory")
        proven: list[TrialRecord] = []
        for candidate in self.provable(outcome.ranked):
            proof = self.proof_of(candidate.config)
            if proof.judgement.verdict is not Verdict.FITS:
                notes.append(f"a faster config fitted as a probe and failed its proof ({proof.judgement.verdict})")
                continue
            proven.append(proof)
            notes += slower_than_probed(proof, candidate)
            if len(proven) == MOST_PROVEN or not is_overtaken(proof, outcome, bounds.tolerance):
                break
        best = max(proven, key=lambda trial: trial.tokens_per_second or 0.0, default=None)
        if len(proven) > 1:
            notes.append("the first proof was slower than its probe: the next config was proven too, the faster kept")
        if best is not None and self.request.lengths and (packed := packed_to_try(self.request, best.config)):
            tried = self.measure(packed, "the answer with packed rows, to compare")
            notes.append(packed_line(best, tried, self.request.lengths))
        took_s = self.seams.monotonic() - self.began
        if best is not None and bounds.budget_s is not None and took_s > bounds.budget_s:
            why = "predictions, a probe and its proof are made, however long they take"
            notes.append(f"it took {took_s:.0f} s, more than --budget {bounds.budget_s:g}s: {why}")
        return self.recommend(best, notes=tuple(notes), from_database=self.probes == 0 and bool(self.trials))

    def seek(
        self,
        space: SearchSpace,
        predictor: Predictor,
        bounds: Bounds,
        recorded: Mapping[TrainingConfig, Observation],
        *,
        fresh: bool,
    ) -> Outcome | None:
        """What a search with predictions finds; None where nothing can be predicted."""
        known = [] if fresh else [*recorded.values(), *self.valid_here(predictor, space, recorded)]
        steps = seek(
            [space, *space.fallbacks(self.ladder)],
            predictor,
            self.device,
            known=known,
            earlier=() if fresh else self.earlier(predictor),
            tolerance=bounds.tolerance,
            max_probes=bounds.max_probes,
        )
        search = Search(space, steps, known=known, allowed_bytes=predictor.allowed_bytes)
        self.seeks = True
        outcome = self.drive(search, bounds)
        self.seeks = outcome is not None
        return outcome

    def climb(self, space: SearchSpace, bounds: Bounds, recorded: Mapping[TrainingConfig, Observation]) -> Outcome:
        """What a search without predictions of speed finds; what is predicted not to fit is skipped."""
        while True:
            steps = climb(space, self.ladder, self.request, self.device, 2 * bounds.tolerance, bounds.max_probes)
            outcome = self.drive(Search(space, steps, recorded), bounds)
            if outcome is None or outcome.ranked or not self.skipped or self.trials or not self.closest_skipped_fits():
                return outcome or conclude(space, (), "nothing could be tried")
            self.believes, self.skipped = False, {}
            recorded = {**recorded, **self.recorded_now()}

    def deaths_of_runs(self) -> list[TrialRecord]:
        """Real runs of this model that ran out of memory where there was as much of it as here."""
        if self._deaths is None:
            stored = self.seams.store.trials(model_fingerprint=self.request.model.fingerprint)
            runs = [trial for trial in stored if trial.origin is Origin.RUN and self.is_of_here(trial)]
            self._deaths = [t for t in runs if t.judgement.verdict in _OUT_OF_MEMORY and self.had_as_much(t)]
        return self._deaths

    def is_of_here(self, trial: TrialRecord) -> bool:
        return trial.environment.fingerprint == self.environment.fingerprint

    def had_as_much(self, run: TrialRecord) -> bool:
        """As this request may use; on the CPU of a limit in a probe's terms, where that is known."""
        limit, total = self.request.memory_limit_bytes, self.device.total_bytes
        if self.device.kind == "cpu":
            return limit is not None and (run.report.limit_bytes or 0) >= limit
        return (run.memory_limit_bytes or total or 0) >= (limit or total or math.inf)

    def is_refuted(self, trial: TrialRecord) -> bool:
        """Whether it fitted, and a real run died with what surely needs no more: batches that differ in length leave
        memory in pieces that a probe of one length never sees."""
        fitted = trial.judgement.verdict is Verdict.FITS
        return fitted and any(is_no_smaller(trial.config, death.config) for death in self.deaths_of_runs())

    def runs_died_with(self, space: SearchSpace) -> dict[TrainingConfig, Observation]:
        """The configs of this space that real runs died with, at the length wanted: it is no shorter than theirs."""
        wanted = self.request.start
        found = {}
        for death in self.deaths_of_runs():
            config = death.config
            if config.sequence_length > wanted.sequence_length or space.samples % config.micro_batch_size:
                continue
            config = replace(
                config,
                sequence_length=wanted.sequence_length,
                gradient_accumulation_steps=space.samples // config.micro_batch_size,
                world_size=wanted.world_size,
                eval_micro_batch_size=wanted.eval_micro_batch_size,
            )
            if space.legal(config) is None:
                found[config] = replace(self.observe(death), config=config)
        return found

    def refuted_line(self, fresh: bool) -> tuple[str, ...]:
        deaths = [] if fresh else self.deaths_of_runs()
        if not deaths:
            return ()
        return (f"{len(deaths)} real run(s) of this model ran out of memory here: what needs as much was left out",)

    def drive(self, search: Search, bounds: Bounds) -> Outcome | None:
        """Measure what a search asks for until it or the budget ends."""
        while (proposal := search.ask()) is not None:
            if self.is_spent(bounds):
                search.stop(f"stopped: the budget of {bounds.budget_s:.0f} s leaves no time for another probe")
                break
            if self.skips(proposal.config):
                search.tell(proposal, not_worth_a_probe(proposal.config))
                continue
            trial = self.measure(proposal.config, proposal.reason, proposal=proposal)
            search.tell(proposal, self.observe(trial))
        return search.result

    def check_budget(self, bounds: Bounds) -> None:
        """Raises `InvalidRequest` for a budget in which nothing can be proven."""
        least = self.shortest_probe_s()
        if bounds.budget_s is not None and bounds.budget_s < least:
            raise InvalidRequest(
                f"--budget {bounds.budget_s:g}s is too small for one probe, which takes about {least:.0f} s here:"
                " give more, or leave it out"
            )

    def shortest_probe_s(self) -> float:
        """Of a fresh process: what this device's proofs took, else what starting one takes anywhere."""
        proofs = [trial.report.wall_time_s for trial in self.stored if trial.origin is Origin.PROOF]
        return min(proofs, default=LEAST_PROBE_S)

    def is_spent(self, bounds: Bounds) -> bool:
        """Whether another probe and the proof would exceed the budget, as far as earlier ones tell."""
        if bounds.budget_s is None or not self.probes:
            return False
        walls = [trial.report.wall_time_s for trial in self.trials[-self.probes :]]
        left = bounds.budget_s - (self.seams.monotonic() - self.began)
        return left < statistics.median(walls) + max(walls)

    def valid_here(
        self, predictor: Predictor, space: SearchSpace, recorded: Mapping[TrainingConfig, Observation]
    ) -> list[Observation]:
        """Trials of the same model under another limit that hold under this one: what they took, or ran out of."""
        allowed = predictor.allowed_bytes
        found: dict[TrainingConfig, Observation] = {}
        for trial in self.of_model():
            if trial.config in recorded or trial.origin is not Origin.PROBE or space.legal(trial.config) is not None:
                continue
            if self.is_refuted(trial):
                continue
            observation = self.observe(trial)
            used = trial.report.peak_reserved_bytes if self.device.kind == "cpu" else trial.report.device_used_bytes
            holds = observation.fits and (allowed is None or (used is not None and used <= allowed))
            if holds or (observation.out_of_memory and (allowed or math.inf) <= (trial.report.limit_bytes or 0)):
                found[trial.config] = observation
        return list(found.values())

    def earlier(self, predictor: Predictor) -> list[Earlier]:
        """Trials of this device that say how fast it is, those of this request left out."""
        found = []
        for trial in self.of_device():
            step = trial.report.step_time_s(trial.config.gradient_accumulation_steps)
            seconds = trial.prediction.seconds_by_kind if trial.prediction else None
            if (
                trial.request_id == self.id
                or trial.report.timed_lengths
                or trial.judgement.verdict is not Verdict.FITS
                or not step
                or not seconds
            ):
                continue
            same = trial.model_fingerprint == self.request.model.fingerprint
            times = trial.report.micro_batch_times_s
            found.append(
                Earlier(config=trial.config, seconds=seconds, step_time_s=step, times_s=times, same_model=same)
            )
        return found[-EARLIER:]

    def of_device(self) -> list[TrialRecord]:
        """Stored trials in this environment, of any request."""
        if self._of_device is None:
            same = self.environment.fingerprint
            stored = self.seams.store.trials()
            self._of_device = [trial for trial in stored if trial.environment.fingerprint == same]
        return self._of_device

    def of_model(self) -> list[TrialRecord]:
        model = self.request.model.fingerprint
        return [t for t in self.of_device() if t.model_fingerprint == model and t.request_id != self.id]

    def skips(self, config: TrainingConfig) -> bool:
        """Whether a config is predicted not to fit, and is left out for it."""
        predictor = self.seams.predictor
        if predictor is None or not self.believes or self.seeks or not predictor.hopeless(config):
            return False
        prediction = predictor.predict(config)
        if prediction is None:
            return False
        self.skipped[config] = prediction
        self.seams.observer.trial_skipped(config, prediction)
        return True

    def closest_skipped_fits(self) -> bool:
        """Nothing fits, as predicted: the config that would take least is measured, so that a fit has seen one."""
        closest = min(self.skipped, key=lambda config: self.skipped[config].peak_allocated_bytes)
        trial = self.measure(closest, "nothing is predicted to fit: the closest is measured")
        return trial.judgement.verdict is Verdict.FITS

    def recorded_now(self) -> dict[TrainingConfig, Observation]:
        """What this fit has measured so far."""
        return {trial.config: self.observe(trial) for trial in self.trials if trial.origin is Origin.PROBE}

    def skipped_line(self, outcome: Outcome) -> tuple[str, ...]:
        skipped = len(self.skipped) + outcome.hopeless
        if not skipped:
            return ()
        return (f"{skipped} config(s) predicted not to fit and not probed (--no-prediction probes them)",)

    def provable(self, ranked: Sequence[Observation]) -> Iterator[Observation]:
        """Candidates for a proof, fastest first; after one that ran out of memory only those that took less."""
        proven = 0
        smallest: int | None = None
        for candidate in ranked:
            if smallest is not None and (candidate.peak_bytes is None or candidate.peak_bytes >= smallest):
                continue
            if proven == MAX_PROOFS:
                return
            proven += 1
            yield candidate
            if self.trials[-1].judgement.verdict in _OUT_OF_MEMORY:
                smallest = candidate.peak_bytes

    def proof_of(self, config: TrainingConfig) -> TrialRecord:
        """The proof on record that failed or held in this environment, or a new one."""
        for trial in self.trials:
            if trial.origin is Origin.PROOF and trial.config == config:
                return trial
        return self.measure(config, "the fastest that fits: proven in a fresh worker", proof=True)

    def measure(
        self, config: TrainingConfig, reason: str, *, proof: bool = False, proposal: Proposal | None = None
    ) -> TrialRecord:
        """Probe, judge, store, tell; what is not about memory and stays so after one retry ends the fit."""
        self.seams.observer.trial_starts(config, reason, proof=proof)
        moves = (proposal.moves if proposal else ()) or self.moves_to(config)
        trial = self._trial(config, proof=proof, fresh=proof, moves=moves)
        if trial.judgement.verdict in _RETRIED:
            self.seams.observer.trial_starts(
                config, f"{trial.judgement.verdict}: once more, in a fresh worker", proof=proof
            )
            trial = self._trial(config, proof=proof, fresh=True, moves=trial.moves)
        if trial.judgement.verdict is Verdict.INTERRUPTED:
            raise Interrupted("a probe was interrupted; everything measured is kept")
        unproven = proof and trial.judgement.verdict is Verdict.AMBIGUOUS  # the next best may stand its proof
        if self.is_unsupported_variation(trial):
            return trial
        if trial.judgement.verdict not in (Verdict.FITS, *_OUT_OF_MEMORY) and not unproven:
            raise ProbeFailed(
                failure_line(trial),
                worker_exit_code=trial.report.exit_code,
                stderr_tail=trial.report.log_tail,
            )
        return trial

    def observe(self, trial: TrialRecord) -> Observation:
        return observe(trial, on_cpu=self.device.kind == "cpu")

    def moves_to(self, config: TrainingConfig) -> tuple[str, ...]:
        return tuple(move.name for move in self.ladder if move.explains(self.request.start, config))

    def is_unsupported_variation(self, trial: TrialRecord) -> bool:
        """A setting that this model or library does not have, where others ran: not legal, and no reason to stop."""
        failure = trial.report.failure
        unsupported = failure is not None and (failure.exception or "").endswith(".UnsupportedModel")
        return unsupported and any(t.judgement.verdict in (Verdict.FITS, *_OUT_OF_MEMORY) for t in self.trials)

    def _trial(self, config: TrainingConfig, *, proof: bool, fresh: bool, moves: tuple[str, ...]) -> TrialRecord:
        request = self.probe_request(config, proof=proof)
        predictor = self.seams.predictor
        prediction = predictor.predict(config) if predictor else None  # before the probe runs
        self.seams.judge.begin()
        report = self.seams.executor.probe(request, fresh=fresh or self.request.isolation is Isolation.FRESH)
        self.probes += 1
        trial = TrialRecord(
            request_id=self.id,
            model_name=self.request.model.name,
            model_fingerprint=self.request.model.fingerprint,
            device_slug=self.device.slug,
            config=config,
            memory_limit_bytes=self.request.memory_limit_bytes,
            report=report,
            judgement=self.seams.judge.judge(report, request),
            environment=self.environment,
            origin=Origin.PROOF if proof else Origin.PROBE,
            time_utc=self.seams.now_utc(),
            moves=moves,
            prediction=prediction,
        )
        trial = self.seams.store.append(trial)  # committed before it is shown
        if predictor:
            predictor.learn(trial)
        self.trials.append(trial)
        self.seams.observer.trial_ends(trial)
        return trial

    def probe_request(self, config: TrainingConfig, *, proof: bool) -> ProbeRequest:
        asked = ProbeRequest(
            model=self.request.model,
            config=config,
            device=self.device.id,
            memory_limit_bytes=self.request.memory_limit_bytes,
            headroom_bytes=self.headroom_bytes,
            proof=proof,
            optimizer_steps=PROOF_STEPS if proof else 1,
            beat_s=None if proof else self.to_beat_s(config),
        )
        return with_mix(asked, self.request.lengths)

    def to_beat_s(self, config: TrainingConfig) -> float | None:
        """Seconds of a micro batch at which this config is as fast as the fastest so far; None: there is none."""
        fits = [t for t in self.trials if t.origin is Origin.PROBE and t.tokens_per_second]
        alike = [t for t in fits if t.config.sequence_length == config.sequence_length]
        best = max(alike, key=lambda trial: trial.tokens_per_second or 0.0, default=None)
        if best is None or not best.tokens_per_second:
            return None
        mix = self.request.lengths
        tokens = tokens_per_row(config, mix) if mix else config.sequence_length
        step = tokens * config.effective_batch_size / best.tokens_per_second
        optimizer = statistics.median(best.report.optimizer_times_s)
        return max(0.0, step - optimizer) / config.gradient_accumulation_steps

    def recommend(
        self, proof: TrialRecord | None, *, notes: tuple[str, ...] = (), from_database: bool = False
    ) -> Recommendation:
        return Recommendation(
            status=FitStatus.FITTED if proof else FitStatus.NOTHING_FITS,
            device=self.device,
            rehearsal=self.device.kind == "cpu",
            request=self.request,
            proof=proof,
            trials=tuple(self.trials),
            moves=moves_taken(self.request.start, proof.config, self.trials, self.ladder) if proof else (),
            notes=notes,
            from_database=from_database,
            probes=self.probes,
            out_of_memory=sum(t.judgement.verdict in _OUT_OF_MEMORY for t in self.trials),
            wall_time_s=self.seams.monotonic() - self.began,
        )


def is_no_smaller(config: TrainingConfig, died: TrainingConfig) -> bool:
    """Whether `config` surely needs as much as what died: how it is evaluated and accumulated changes nothing of it."""
    alike = replace(
        config, world_size=died.world_size, eval_micro_batch_size=died.eval_micro_batch_size, trainer=died.trainer
    )
    return needs_at_least(alike, died)


def last_answer(stored: Sequence[TrialRecord]) -> TrialRecord | None:
    """The proof that the last finished fit handed back: of those it took one after the other the fastest."""
    proofs: list[TrialRecord] = []
    for trial in reversed(stored):
        holds = trial.origin is Origin.PROOF and trial.judgement.verdict is Verdict.FITS
        if proofs and trial.origin is not Origin.PROOF:
            break
        proofs += [trial] * holds
    return max(proofs, key=lambda trial: trial.tokens_per_second or 0.0, default=None)


def is_overtaken(proof: TrialRecord, outcome: Outcome, tolerance: float) -> bool:
    """Whether, with what the proof measured, another config is believed to be faster by more than `tolerance`."""
    mine = outcome.believed.get(proof.config)
    others = [mean for config, (mean, _) in outcome.believed.items() if config != proof.config]
    if mine is None or not others or not proof.tokens_per_second:
        return False
    mean, sd = mine
    noise = noise_of(comparable_times_s(proof.report))
    share = sd**2 / (sd**2 + noise**2)
    return mean + share * (-math.log(proof.tokens_per_second) - mean) > min(others) + tolerance


def observe(trial: TrialRecord, *, on_cpu: bool = False) -> Observation:
    """A trial as the search sees it."""
    fits = trial.judgement.verdict is Verdict.FITS
    return Observation(
        config=trial.config,
        fits=fits,
        out_of_memory=trial.judgement.verdict in _OUT_OF_MEMORY,
        tokens_per_second=trial.tokens_per_second,
        spread=spread_of(trial.report.micro_batch_times_s),
        peak_bytes=trial.report.peak_allocated_bytes if fits else None,
        step_time_s=trial.report.step_time_s(trial.config.gradient_accumulation_steps) if fits else None,
        times_s=comparable_times_s(trial.report),
        needed_bytes=trial.report.peak_reserved_bytes if fits and on_cpu else None,
        reserved_bytes=trial.report.peak_reserved_bytes if fits and not on_cpu else None,
        wanted_bytes=wanted_bytes(trial, on_cpu=on_cpu),
        start_s=trial.report.startup_s if trial.report.isolation is Isolation.WARM else None,
        cut_short=trial.report.cut_short,
    )


def comparable_times_s(report: ProbeReport) -> tuple[float, ...]:
    """Times of micro batches; those of several lengths each as a share of its length's median, so that they compare."""
    count = len(report.timed_lengths)
    if count < 2:
        return report.micro_batch_times_s
    medians = [statistics.median(report.micro_batch_times_s[number::count] or (1.0,)) for number in range(count)]
    return tuple(time / medians[number % count] for number, time in enumerate(report.micro_batch_times_s))


def wanted_bytes(trial: TrialRecord, *, on_cpu: bool) -> int | None:
    """Of one that ran out: what was held and what the failed allocation asked for, a lower bound of its need."""
    numbers = trial.judgement.numbers
    held = trial.report.peak_reserved_bytes if on_cpu else numbers.get("allocated_bytes")
    tried = numbers.get("tried_bytes")
    if trial.judgement.verdict is not Verdict.DEVICE_OOM or held is None or tried is None:
        return None
    return held + tried - (0 if on_cpu else SEGMENT_BYTES)


def not_worth_a_probe(config: TrainingConfig) -> Observation:
    """A config that is predicted not to fit, as the search sees it."""
    return Observation(
        config=config,
        fits=False,
        out_of_memory=True,
        tokens_per_second=None,
        spread=None,
        peak_bytes=None,
        probed=False,
    )


def slower_than_probed(proof: TrialRecord, probed: Observation) -> tuple[str, ...]:
    """A line where proof and probe disagree on speed: something else was running during one of them."""
    if not proof.tokens_per_second or not probed.tokens_per_second:
        return ()
    ratio = proof.tokens_per_second / probed.tokens_per_second
    if 1 / DISAGREEMENT <= ratio <= DISAGREEMENT:
        return ()
    return (f"the proof ran at {ratio:.2f} times the probe's speed: this device was not idle, so speeds are uncertain",)


def spread_of(times_s: Sequence[float]) -> float | None:
    """Half of (largest − smallest) ÷ median: the uncertainty of a time, as a fraction. None for fewer than two."""
    if len(times_s) < 2:
        return None
    return (max(times_s) - min(times_s)) / (2 * statistics.median(times_s))


def has_room(device: Device, proof: TrialRecord, headroom_bytes: int) -> bool:
    """Whether the card has as much free now as the proven peak takes, others' memory at the time left out."""
    used = proof.report.device_used_bytes if device.kind != "cpu" else proof.report.peak_reserved_bytes
    if device.free_bytes is None or used is None:
        return True
    others = sum(tenant.used_bytes or 0 for tenant in proof.report.tenants)
    return device.free_bytes >= used - others + headroom_bytes


def left_out(space: SearchSpace) -> tuple[str, ...]:
    """A line for each setting that was asked for and cannot run on this device or with its software."""
    asked = {name: f"{name}={getattr(space.request.start, name)}" for name in space.settings}
    return tuple(f"{one} was asked for and left out: {why}" for one, why in space.excluded if one in asked.values())


_FAILED = {
    Verdict.NOT_OOM: "a probe failed{where}, and not for memory",
    Verdict.AMBIGUOUS: "ambiguous death of a probe{where}",
    Verdict.HOST_OOM: "a probe ran out of system RAM{where}",
    Verdict.TIMEOUT: "timeout of a probe{where}",
    Verdict.DEVICE_LOST: "the device was lost{where}",
}
_BEFORE_TRAINING = ("start", "import", "context", "build")


def failure_line(trial: TrialRecord) -> str:
    """One line: what died, where, and what to do."""
    failure, judgement, words = trial.report.failure, trial.judgement, last_words(trial)
    if failure and (failure.exception or "").endswith(".UnsupportedModel"):
        return f"{words.partition(': ')[2].rstrip(' .')}. Change the setting or the model that this is about"
    where = f" in phase {failure.phase}" if failure else ""
    what = _FAILED.get(judgement.verdict, str(judgement.verdict)).format(where=where)
    parts = [f"{what}: {words.replace(where, '', 1)}", judgement.action]
    if judgement.settle:
        parts.append(f"What would settle it: {judgement.settle}")
    if failure and failure.phase in _BEFORE_TRAINING:
        parts.append("`autotune doctor` looks at this environment")
    return ". ".join(part.rstrip(" .") for part in parts)


def last_words(trial: TrialRecord) -> str:
    """How a probe ended: its exception, its signal, what was judged, with the last line it printed."""
    report, evidence = trial.report, trial.judgement.evidence
    if report.failure is None:
        return evidence[0] if evidence else f"exit code {report.exit_code}"
    said = (report.failure.message.strip().splitlines() or [""])[0][:400]
    if report.failure.exception:
        return f"{report.failure.exception.rsplit('.', 1)[-1]}: {said}"
    if said:
        return said
    end = evidence[0] if evidence else f"exit code {report.exit_code}"
    if report.signal is not None:
        end = f"killed by {next((one.name for one in signal.Signals if one == report.signal), report.signal)}"
    printed = report.log_tail.strip().splitlines()
    return f"{end}; it last printed: {printed[-1].strip()[:300]}" if printed else end


def moves_taken(
    start: TrainingConfig, end: TrainingConfig, trials: Sequence[TrialRecord], ladder: Sequence[MemoryMove]
) -> tuple[Move, ...]:
    """The moves that lead from `start` to `end`, each with its measured saving and cost where a pair shows it.

    A pair is two trials alike in everything but the fields that the move changed.
    """
    moves = []
    for move in ladder:
        change = _change_by(move, start, end)
        if change:
            saved, ratio = _effect(change, trials)
            shown = {name: (to_json(old), to_json(new)) for name, (old, new) in change.items()}
            moves.append(
                Move(name=move.name, preserves=move.preserves, changed=shown, saved_bytes=saved, speed_ratio=ratio)
            )
    return tuple(moves)


def _change_by(move: MemoryMove, start: TrainingConfig, end: TrainingConfig) -> dict[str, tuple[Any, Any]]:
    """The fields between the two that this move explains by itself: {name: (from, to)}."""
    pairs = {item.name: (getattr(start, item.name), getattr(end, item.name)) for item in dataclasses.fields(start)}
    change = {
        name: (old, new)
        for name, (old, new) in pairs.items()
        if old != new and move.explains(start, replace(start, **{name: new}))
    }
    if "micro_batch_size" in change:
        change["gradient_accumulation_steps"] = pairs["gradient_accumulation_steps"]
    return change


def _effect(change: Mapping[str, tuple[Any, Any]], trials: Sequence[TrialRecord]) -> tuple[int | None, float | None]:
    """(bytes saved, speed after ÷ before) of a change, from the last pair of trials that differ only in it."""
    by_config = {t.config: t for t in trials if t.origin is Origin.PROBE and t.judgement.verdict is Verdict.FITS}
    saved = ratio = None
    for config, after in by_config.items():
        if any(getattr(config, name) != new for name, (_, new) in change.items()):
            continue
        before = by_config.get(replace(config, **{name: old for name, (old, _) in change.items()}))
        if before is None:
            continue
        if before.report.peak_allocated_bytes and after.report.peak_allocated_bytes:
            saved = before.report.peak_allocated_bytes - after.report.peak_allocated_bytes
        if before.tokens_per_second and after.tokens_per_second:
            ratio = after.tokens_per_second / before.tokens_per_second
    return saved, ratio
