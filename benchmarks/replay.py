"""A recorded landscape as the device of a fit: the real search runs, and every probe is answered from the file.

Nothing is trained and no time passes: seconds are added up from what was recorded. The search, the flow and the
verdicts' consequences are the program's own; here are only its seams.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from autotune.errors import AutotuneError
from autotune.landscape import Landscape, Row
from autotune.predict.forecast import ALLOCATED_INTERVAL
from autotune.probe.race import is_beaten, is_enough
from autotune.protocols import TrialStore
from autotune.search.space import build_space
from autotune.tuner import Seams, fit
from autotune.values import (
    Environment,
    Failure,
    FitRequest,
    Isolation,
    Judgement,
    Prediction,
    ProbeReport,
    ProbeRequest,
    Recommendation,
    TrainingConfig,
    TrialRecord,
    Verdict,
)
from benchmarks.memory_store import MemoryStore
from strategies import LADDER

PROBE_BATCHES = 6  # timed by a probe at most; recorded samples beyond are for proofs
FORWARD = 1 / 3  # of a micro batch's time: the backward takes twice the forward's
_PROOF_BATCHES = 2  # micro batches to a proof's step, as the worker takes them
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_LONGEST_S = 1e11  # of a clock: calendars end in the year 9999

#: What is learned: a row that differs from the request in one of these is no answer to it.
_LEARNED = (
    *("sequence_length", "effective_batch_size", "world_size", "quantization", "double_quant", "compute_dtype"),
    *("autocast", "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "adapter_dtype", "trainer"),
)


class NotInLandscape(AutotuneError):
    """A config was probed that the landscape has no row of."""


# What is recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """One batch of one setting: recorded, or drawn between rows. Seconds are of one micro batch and one optimizer."""

    fits: bool
    micro_s: float  # as measured
    true_micro_s: float  # without noise, where the landscape knows it
    optimizer_s: float
    memory: float  # a fraction of what is allowed


class Recorded:
    """A landscape, looked up."""

    def __init__(self, landscape: Landscape) -> None:
        self.header = landscape.header
        self.start = landscape.header.start
        self.request = FitRequest(
            model=landscape.header.model,
            start=landscape.header.start,
            sequence_length_stated=True,
            memory_limit_bytes=landscape.header.memory_limit_bytes,
        )
        space = build_space(self.request, self.header.device, installed=self.header.installed)
        alike = [row for row in landscape.rows if _is_alike(row.config, self.start)]
        self.rows = {row.config: row for row in alike if space.legal(row.config) is None}
        self.lines: dict[TrainingConfig, list[Row]] = {}
        for row in sorted(self.rows.values(), key=lambda row: row.config.micro_batch_size):
            self.lines.setdefault(settings_of(row.config), []).append(row)
        fits = [row for row in self.rows.values() if row.verdict is Verdict.FITS and row.micro_batch_times_s]
        self.best = min(fits, key=seconds_of, default=None)

    @property
    def allowed_bytes(self) -> int | None:
        """What a config may need on the whole device; None: there is no limit."""
        limit = self.header.memory_limit_bytes or self.header.device.total_bytes
        return None if limit is None else limit - self.header.headroom_bytes

    @property
    def samples(self) -> int:
        """Samples of an optimizer step on one device: the largest micro batch there can be."""
        return self.start.effective_batch_size // self.start.world_size

    def row(self, config: TrainingConfig) -> Row:
        """Raises `NotInLandscape`."""
        found = self.rows.get(config)
        if found is None:
            raise NotInLandscape(
                f"landscape {self.header.name!r} has no row of {_in_words(config)}: measure it with `autotune sweep`"
            )
        return found

    def filling_s(self, config: TrainingConfig) -> float:
        """Seconds until a config that is too large has filled the memory: the forward of the largest that fits."""
        rows = self.lines.get(settings_of(config), [])
        fits = [row for row in rows if row.micro_batch_times_s and row.verdict is Verdict.FITS]
        return FORWARD * statistics.median(fits[-1].micro_batch_times_s) if fits else 0.0

    def spot(self, settings: TrainingConfig, batch: int) -> Spot:
        """A batch of these settings. One that is not recorded lies on the line through its neighbours.

        It runs out of memory from the first recorded one on that does, and beyond the memory allowed.
        """
        rows = self.lines[settings]
        own = next((row for row in rows if row.config.micro_batch_size == batch), None)
        ran = [row for row in rows if row.micro_batch_times_s]
        failed = [row.config.micro_batch_size for row in rows if row.verdict is not Verdict.FITS]
        if not ran:
            return Spot(fits=False, micro_s=0.0, true_micro_s=0.0, optimizer_s=0.0, memory=math.inf)
        sizes = [float(row.config.micro_batch_size) for row in ran]
        known = all(row.needed_bytes is not None for row in ran)
        needed = (
            _line(sizes, [float(row.needed_bytes or 0) for row in ran], batch, through_zero=False) if known else None
        )
        if own is not None:
            fits = own.verdict is Verdict.FITS
        elif failed and batch >= min(failed):
            fits = False
        else:
            fits = batch < sizes[-1] or (needed is not None and needed <= (self.allowed_bytes or math.inf))
        memory = math.inf if needed is None else needed / (self.allowed_bytes or math.inf)
        return Spot(
            fits=fits,
            micro_s=_time_line(sizes, [statistics.median(row.micro_batch_times_s) for row in ran], batch),
            true_micro_s=_time_line(sizes, [true_micro_s(row) for row in ran], batch),
            optimizer_s=_time_line(sizes, [_optimizer_s(row) for row in ran], batch, constant=True),
            memory=memory,
        )

    def regret(self, seconds: float) -> float | None:
        """How much longer than the best row's optimizer step this one takes, a fraction; None where nothing fits.

        Zero within the best row's own samples, where its noise-free time is not known; never below zero.
        """
        if self.best is None:
            return None
        if self.best.true_step_time_s is None and seconds <= _slowest_s(self.best):
            return 0.0
        return max(0.0, seconds / seconds_of(self.best) - 1.0)


def _in_words(config: TrainingConfig) -> str:
    """What a search moves, with its values."""
    names = ("sequence_length", "micro_batch_size", "gradient_checkpointing", "attention", "loss", "upcast")
    return ", ".join(f"{name} {getattr(config, name)}" for name in (*names, "optimizer", "allocator"))


def settings_of(config: TrainingConfig) -> TrainingConfig:
    """All of a config but its batch."""
    return replace(config, micro_batch_size=1, gradient_accumulation_steps=1)


def seconds_of(row: Row) -> float:
    """Of its optimizer step: without noise where that is known, else from the medians."""
    if row.true_step_time_s is not None:
        return row.true_step_time_s
    accumulation = row.config.gradient_accumulation_steps
    return accumulation * statistics.median(row.micro_batch_times_s) + _optimizer_s(row)


def true_micro_s(row: Row) -> float:
    """Of one micro batch, without noise where that is known."""
    return (seconds_of(row) - _optimizer_s(row)) / row.config.gradient_accumulation_steps


def _optimizer_s(row: Row) -> float:
    return statistics.median(row.optimizer_times_s) if row.optimizer_times_s else 0.0


def _slowest_s(row: Row) -> float:
    accumulation = row.config.gradient_accumulation_steps
    return accumulation * max(row.micro_batch_times_s) + max(row.optimizer_times_s, default=0.0)


def _is_alike(config: TrainingConfig, start: TrainingConfig) -> bool:
    same_states = ("8bit" in config.optimizer) == ("8bit" in start.optimizer)
    return same_states and all(getattr(config, name) == getattr(start, name) for name in _LEARNED)


def _line(sizes: Sequence[float], values: Sequence[float], at: float, *, through_zero: bool) -> float | None:
    """Linear between neighbours and beyond the ends; of a single point through zero, or None."""
    if len(sizes) == 1:
        if at == sizes[0]:
            return values[0]
        return values[0] * at / sizes[0] if through_zero else None
    above = next((i for i, size in enumerate(sizes) if size >= at), len(sizes) - 1)
    high = max(1, above)
    low = high - 1
    share = (at - sizes[low]) / (sizes[high] - sizes[low])
    return values[low] + share * (values[high] - values[low])


def _time_line(sizes: Sequence[float], values: Sequence[float], at: float, *, constant: bool = False) -> float:
    """The same of seconds, which are above zero; `constant`: beyond the ends they stay."""
    at = min(max(at, sizes[0]), sizes[-1]) if constant else at
    found = _line(sizes, values, at, through_zero=True)
    return max(found or 0.0, 0.0 if constant else 0.1 * min(values))


# The seams


@dataclass(slots=True)
class ReplayExecutor:
    """A `ProbeExecutor` whose probes are rows. `clock_s` is what they would have taken.

    A probe takes its start, a micro batch to warm up, the timed micro batches and the optimizer. The first warm one
    starts the worker, so its start is a fresh process's.
    """

    recorded: Recorded
    clock_s: float = 0.0
    probes: int = 0
    out_of_memory: int = 0
    worker_up: bool = False

    def probe(self, request: ProbeRequest, *, fresh: bool = False) -> ProbeReport:
        """Raises `NotInLandscape`."""
        row = self.recorded.row(request.config)
        start_s = self.recorded.header.fresh_start_s if fresh or not self.worker_up else row.startup_s
        self.worker_up = self.worker_up or not fresh
        runs = bool(row.micro_batch_times_s) and row.verdict is not Verdict.DEVICE_OOM
        report = self._finished(row, request) if runs else self._failed(row)
        report = replace(
            report,
            startup_s=start_s,
            wall_time_s=start_s + report.wall_time_s,
            phases_s={"build": start_s, **report.phases_s},
            isolation=Isolation.FRESH if fresh else Isolation.WARM,
            limit_bytes=self.recorded.allowed_bytes,
            exit_code=0,
        )
        self.clock_s += report.wall_time_s
        self.probes += 1
        self.out_of_memory += row.verdict is not Verdict.FITS
        return report

    def environment(self) -> Environment:
        """The landscape's, else one that knows nothing."""
        nothing = dict.fromkeys(("driver", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl"), None)
        return self.recorded.header.environment or Environment(**nothing, python="", os="")

    def close(self) -> None:
        self.worker_up = False

    def elapsed_s(self) -> float:
        return self.clock_s

    def now_utc(self) -> str:
        return (_EPOCH + timedelta(seconds=min(self.clock_s, _LONGEST_S))).isoformat()

    def _finished(self, row: Row, request: ProbeRequest) -> ProbeReport:
        timed = self._proof(row, request) if request.proof else self._timed(row, request)
        on_cpu = self.recorded.header.device.kind == "cpu"
        return replace(
            timed,
            loss=1.0,
            losses=(1.0,) * len(timed.micro_batch_times_s),
            peak_allocated_bytes=row.peak_allocated_bytes,
            peak_reserved_bytes=(row.needed_bytes if on_cpu else None) or row.peak_reserved_bytes,
            device_used_bytes=row.needed_bytes,
        )

    def _timed(self, row: Row, request: ProbeRequest) -> ProbeReport:
        """The recorded micro batches until they say enough, as a worker stops."""
        taken: list[float] = []
        beaten = False
        for time_s in row.micro_batch_times_s[: request.micro_batches]:
            taken.append(time_s)
            beaten = is_beaten(taken, request.beat_s) and len(taken) < request.micro_batches
            if beaten or is_enough(taken):
                break
        optimizer = row.optimizer_times_s[:1] or (0.0,)
        training = statistics.median(row.micro_batch_times_s) + sum(taken) + sum(optimizer)  # one to warm up
        return ProbeReport(
            micro_batch_times_s=tuple(taken),
            optimizer_times_s=optimizer,
            cut_short=beaten,
            wall_time_s=training,
            phases_s={"forward": training},
        )

    def _proof(self, row: Row, request: ProbeRequest) -> ProbeReport:
        """Whole steps, the first to warm up, on the CPU the second watched; then an evaluation."""
        micro = row.micro_batch_times_s[PROBE_BATCHES:] or row.micro_batch_times_s
        optimizer = row.optimizer_times_s[1:] or row.optimizer_times_s or (0.0,)
        per_step = min(row.config.gradient_accumulation_steps, request.micro_batches, _PROOF_BATCHES)
        untimed = 2 if self.recorded.header.device.kind == "cpu" else 1
        all_micro = [micro[i % len(micro)] for i in range(per_step * request.optimizer_steps)]
        all_optimizer = [optimizer[i % len(optimizer)] for i in range(request.optimizer_steps)]
        evaluation = FORWARD * statistics.median(micro)
        training = sum(all_micro) + sum(all_optimizer) + evaluation
        return ProbeReport(
            micro_batch_times_s=tuple(all_micro[untimed * per_step :] or all_micro[-1:]),
            optimizer_times_s=tuple(all_optimizer[untimed:] or all_optimizer[-1:]),
            eval_time_s=evaluation,
            wall_time_s=training,
            phases_s={"forward": training},
        )

    def _failed(self, row: Row) -> ProbeReport:
        filling = self.recorded.filling_s(row.config)
        on_cpu = self.recorded.header.device.kind == "cpu"
        message = f"recorded: out of memory, {row.tried_bytes} bytes asked for"
        return ProbeReport(
            failure=Failure(phase="forward", exception="torch.OutOfMemoryError", message=message),
            wall_time_s=filling,
            phases_s={"forward": filling},
            peak_allocated_bytes=row.peak_allocated_bytes,
            peak_reserved_bytes=(row.needed_bytes if on_cpu else None) or row.peak_reserved_bytes,
            device_free_bytes=0,
        )


@dataclass(frozen=True, slots=True)
class RecordedJudge:
    """The row's own verdict, with the bytes that the failure named."""

    recorded: Recorded

    def begin(self) -> None:
        pass

    def judge(self, report: ProbeReport, request: ProbeRequest) -> Judgement:
        row = self.recorded.row(request.config)
        named = {"tried_bytes": row.tried_bytes, "allocated_bytes": row.peak_allocated_bytes}
        numbers = {name: size for name, size in named.items() if size is not None}
        failed = row.verdict is not Verdict.FITS
        return Judgement(verdict=row.verdict, evidence=("recorded",), numbers=numbers if failed else {})


@dataclass(frozen=True, slots=True)
class RecordedPredictor:
    """The rows' own predictions, with nothing learned. A config without one is not in the search's space."""

    recorded: Recorded

    def predict(self, config: TrainingConfig) -> Prediction | None:
        return self.expect(config)

    def hopeless(self, config: TrainingConfig) -> bool:
        expected, allowed = self.expect(config), self.allowed_bytes
        if expected is None or allowed is None:
            return False
        reserved = expected.peak_reserved_bytes or expected.peak_allocated_bytes
        beside = (expected.device_used_bytes or reserved) - reserved
        return expected.peak_allocated_bytes * (1 - ALLOCATED_INTERVAL) + beside > allowed

    def learn(self, trial: TrialRecord) -> None:
        """The search corrects what it expects by itself."""

    @property
    def allowed_bytes(self) -> int | None:
        return self.recorded.allowed_bytes

    def prepare(self, configs: Iterable[TrainingConfig]) -> None:
        """They were made when the landscape was."""

    def at_hand(self, config: TrainingConfig) -> bool:
        return self.expect(config) is not None

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        expected = self.expect(config)
        return expected.seconds_by_kind if expected else None

    def expect(self, config: TrainingConfig) -> Prediction | None:
        row = self.recorded.rows.get(config)
        return row.predicted if row else None


class _Silent:
    """An `Observer` that shows nothing."""

    def trial_starts(self, config: TrainingConfig, reason: str, *, proof: bool) -> None: ...

    def trial_ends(self, trial: TrialRecord) -> None: ...

    def trial_skipped(self, config: TrainingConfig, prediction: Prediction) -> None: ...


def replay_fit(recorded: Recorded, *, store: TrialStore | None = None) -> tuple[Recommendation, ReplayExecutor]:
    """The program's own fit on a recorded device, and the device after it. Raises `NotInLandscape`."""
    executor = ReplayExecutor(recorded)
    seams = Seams(
        executor=executor,
        store=store or MemoryStore(),
        judge=RecordedJudge(recorded),
        observer=_Silent(),
        now_utc=executor.now_utc,
        monotonic=executor.elapsed_s,
        predictor=RecordedPredictor(recorded),
    )
    header = recorded.header
    found = fit(
        recorded.request,
        header.device,
        seams,
        ladder=LADDER,
        installed=header.installed,
        headroom_bytes=header.headroom_bytes,
    )
    return found, executor
