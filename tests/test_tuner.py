"""The flow with fakes for its seams: recorded runs replay without a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autotune.errors import Interrupted, InvalidRequest, ProbeFailed
from autotune.recommendation import closest_trial, fit_document, fit_file_document, headroom_bytes, outlook
from autotune.tuner import Seams, fit, request_id
from autotune.values import (
    MIB,
    Device,
    Failure,
    FitRequest,
    FitStatus,
    Judgement,
    LengthMix,
    Origin,
    Prediction,
    ProbeReport,
    ProbeRequest,
    Recommendation,
    TrainingConfig,
    TrialRecord,
    Upcast,
    Verdict,
)
from autotune.verdict.judge import classify
from strategies import LADDER
from tests.fakes import FakeExecutor, Law, MemoryStore, a_cpu, a_gpu, a_request


@dataclass
class Watcher:
    """An observer that remembers; `rows_seen` is how many trials the store held when each was shown."""

    store: MemoryStore
    shown: list[TrialRecord] = field(default_factory=list)
    rows_seen: list[int] = field(default_factory=list)
    skipped: list[TrainingConfig] = field(default_factory=list)

    def trial_starts(self, config: TrainingConfig, reason: str, *, proof: bool) -> None:
        assert reason

    def trial_ends(self, trial: TrialRecord) -> None:
        self.shown.append(trial)
        self.rows_seen.append(len(self.store.rows))

    def trial_skipped(self, config: TrainingConfig, prediction: Prediction) -> None:
        self.skipped.append(config)


class PureJudge:
    """The real verdicts, without this machine's evidence."""

    def begin(self) -> None: ...

    def judge(self, report: ProbeReport, request: ProbeRequest) -> Judgement:
        return classify(report, target=request.device, limit_bytes=request.memory_limit_bytes)


@dataclass
class Scene:
    executor: FakeExecutor = field(default_factory=FakeExecutor)
    store: MemoryStore = field(default_factory=MemoryStore)
    device: Device = field(default_factory=a_cpu)
    request: FitRequest = field(default_factory=lambda: limited(1500))

    predictor: Any = None
    tick_s: int = 1  # the clock advances so much each time it is read

    def __post_init__(self) -> None:
        self.watcher = Watcher(self.store)

    def fit(self, **options: Any) -> Recommendation:
        clock = itertools.count(step=self.tick_s)
        seams = Seams(
            executor=self.executor,
            store=self.store,
            judge=PureJudge(),
            observer=self.watcher,
            now_utc=lambda: "2026-01-01T00:00:00+00:00",
            monotonic=lambda: float(next(clock)),
            predictor=self.predictor,
        )
        return fit(self.request, self.device, seams, ladder=LADDER, **options)


def limited(mib: int, **changes: Any) -> FitRequest:
    changes = {"micro_batch_size": 8, "gradient_accumulation_steps": 1, **changes}
    return a_request(memory_limit_bytes=mib * MIB, **changes)


def test_fit_proves_its_winner_in_a_fresh_worker_with_three_steps() -> None:
    scene = Scene()
    result = scene.fit()
    last = scene.executor.requests[-1]
    assert result.status is FitStatus.FITTED
    assert (last.proof, last.optimizer_steps >= 3) == (True, True)
    assert result.proof is not None
    assert result.proof.origin is Origin.PROOF
    assert result.proof.config == last.config


def test_a_fit_without_predictions_may_be_fixed_to_packed_rows() -> None:
    mix = LengthMix(
        quantiles=(32.0, 64.0, 128.0, 256.0), samples=400, longest=256, longest_untruncated=256, truncated=0
    )
    request = limited(1500, fixed=(("packing", True),), allow_near=True, lengths=mix)
    result = Scene(request=request).fit()
    assert result.proof is not None
    assert result.proof.config.packing
    assert result.proof.config.effective_batch_size < 8


def test_what_was_never_run_is_not_said_to_be_known() -> None:
    scene = Scene()
    assert not scene.fit(max_probes=0).from_database


def test_a_budget_below_one_probe_is_refused_before_any() -> None:
    scene = Scene()
    with pytest.raises(InvalidRequest, match=r"--budget 2s is too small for one probe, which takes about 3 s here"):
        scene.fit(budget_s=2.0)
    assert scene.executor.probes == 0


def test_a_spent_budget_ends_in_a_proof_and_what_it_took_more_is_said() -> None:
    roomy = limited(4000)
    whole, cut = Scene(request=roomy).fit(), Scene(request=roomy, tick_s=10).fit(budget_s=3.0)
    assert cut.proof is not None
    assert cut.probes < whole.probes
    assert [note for note in cut.notes if "more than --budget 3s" in note]
    assert not [note for note in Scene().fit(budget_s=1e6).notes if "budget" in note]


def test_fit_meets_out_of_memory_and_steps_down() -> None:
    result = Scene(request=limited(900)).fit()
    assert result.out_of_memory >= 1
    assert result.proof is not None
    assert result.proof.config.effective_batch_size == 8


def test_every_trial_is_stored_before_it_is_shown() -> None:
    scene = Scene()
    scene.fit()
    assert scene.watcher.rows_seen == list(range(1, len(scene.store.rows) + 1))


def test_the_same_request_again_runs_nothing() -> None:
    scene = Scene()
    first = scene.fit()
    probes = scene.executor.probes
    second = scene.fit()
    assert (scene.executor.probes, second.probes, second.from_database) == (probes, 0, True)
    assert second.proof is not None
    assert first.proof is not None
    assert second.proof.config == first.proof.config


def test_fresh_measures_again() -> None:
    scene = Scene()
    scene.fit()
    assert scene.fit(fresh=True).probes > 0


def test_another_software_costs_one_proving_probe() -> None:
    scene = Scene()
    scene.fit()
    scene.store.rows = [replace(row, environment=replace(row.environment, torch="2.12.0")) for row in scene.store.rows]
    again = scene.fit()
    assert (again.probes, again.from_database) == (1, False)
    assert again.proof is not None
    assert again.proof.origin is Origin.PROOF


def test_a_fuller_card_is_searched_again() -> None:
    scene = Scene(device=a_gpu(12), request=limited(8000))
    scene.executor.law = Law()
    scene.fit()
    scene.store.rows = [
        replace(row, report=replace(row.report, device_used_bytes=6000 * MIB)) for row in scene.store.rows
    ]
    scene.device = a_gpu(12, free_bytes=1000 * MIB)
    assert not scene.fit().from_database


@pytest.mark.parametrize("after", range(8))
def test_an_interrupted_fit_goes_on_without_running_a_recorded_trial_again(after: int) -> None:
    whole = Scene(request=limited(900))
    whole.fit()
    scene = Scene(executor=FakeExecutor(interrupt_after=after), request=limited(900))
    if after < whole.executor.probes:
        with pytest.raises(Interrupted):
            scene.fit()
    scene.executor.interrupt_after = None
    scene.fit()
    probed = [request.config for request in scene.executor.requests if not request.proof]
    assert len(probed) == len(set(probed))
    assert scene.executor.probes == whole.executor.probes


def test_a_proof_that_ran_out_of_memory_is_not_run_again() -> None:
    full = Failure(phase="forward", exception="torch.OutOfMemoryError", message="CUDA out of memory.")
    scene = Scene(executor=FakeExecutor(failure=lambda request: full if request.proof else None))
    first, again = scene.fit(), scene.fit()
    assert (first.status, again.status) == (FitStatus.NOTHING_FITS, FitStatus.NOTHING_FITS)
    assert (len(first.trials), again.probes) == (len(again.trials), 0)


def test_not_oom_stops_the_fit_with_the_real_error() -> None:
    failure = Failure(phase="forward", exception="ValueError", message="head_size must divide hidden_size")
    scene = Scene(executor=FakeExecutor(failure=lambda request: failure))
    with pytest.raises(ProbeFailed, match="head_size must divide hidden_size"):
        scene.fit()
    assert scene.executor.probes == 1
    assert scene.store.rows[0].judgement.verdict is Verdict.NOT_OOM


def dies_once(failure: Failure) -> Callable[[ProbeRequest], Failure | None]:
    deaths = iter([failure])
    return lambda request: next(deaths, None)


def test_a_timeout_is_tried_once_more_in_a_fresh_worker() -> None:
    hung = Failure(phase="backward", message="no end of phase backward", at_limit=True)
    scene = Scene(executor=FakeExecutor(failure=dies_once(hung)))
    assert scene.fit().status is FitStatus.FITTED
    assert scene.store.rows[0].judgement.verdict is Verdict.TIMEOUT
    assert scene.store.rows[0].config == scene.store.rows[1].config


def test_two_timeouts_end_the_fit() -> None:
    hung = Failure(phase="backward", message="no end of phase backward", at_limit=True)
    scene = Scene(executor=FakeExecutor(failure=lambda request: hung))
    with pytest.raises(ProbeFailed, match="timeout"):
        scene.fit()
    assert scene.executor.probes == 2


def test_nothing_fits_shows_the_closest() -> None:
    result = Scene(request=limited(200)).fit()
    assert result.status is FitStatus.NOTHING_FITS
    closest = closest_trial(result)
    assert closest is not None
    assert closest.config.micro_batch_size == 1
    assert fit_document(result)["closest"]["verdict"] == "device_oom"


def test_stated_length_is_shortened_only_with_consent() -> None:
    law = Law(activation_bytes_per_token=3_000_000)
    stated = Scene(executor=FakeExecutor(law=law), request=limited(300))
    assert stated.fit().status is FitStatus.NOTHING_FITS
    consented = Scene(executor=FakeExecutor(law=law), request=limited(300, min_sequence_length=64))
    result = consented.fit()
    assert result.proof is not None
    assert 64 <= result.proof.config.sequence_length < 256
    assert "shorter_sequence" in [move.name for move in result.moves]


def test_moves_say_what_each_saved_and_cost() -> None:
    result = Scene(request=limited(1500, upcast=Upcast.FP32)).fit()
    moves = {move.name: move for move in result.moves}
    copies = moves["no_fp32_copies"]
    assert copies.changed == {"upcast": ("fp32", "none")}
    assert copies.saved_bytes == 60 * MIB
    assert copies.speed_ratio == pytest.approx(1 / 0.95, rel=0.01)


def test_requests_that_differ_in_an_answer_have_other_ids() -> None:
    base = limited(1500)
    changes = [limited(1400), replace(base, allow_near=True), replace(base, min_sequence_length=64)]
    ids = {request_id(request, 0) for request in (base, *changes)} | {request_id(base, MIB)}
    assert len(ids) == 5
    assert request_id(replace(base, model=replace(base.model, name="another name")), 0) == request_id(base, 0)


def test_document_has_the_keys_of_the_schema_and_hides_the_uuid() -> None:
    result = Scene(device=a_gpu(12, uuid="GPU-1234"), request=limited(8000)).fit()
    document = fit_document(result)
    wanted = "schema status gpu model request config measured predicted trials probes from_database"
    assert set(wanted.split()) <= set(document)
    assert document["schema"] == "autotune.fit/1"
    assert {"config", "predicted", "report", "verdict", "origin"} <= set(document["trials"][0])
    assert set(document["probes"]) == {"count", "out_of_memory", "wall_time_s"}
    assert "GPU-1234" not in str(document)
    assert "trials" not in fit_file_document(result)


def test_outlook_names_what_is_next() -> None:
    result = Scene(request=limited(900)).fit()
    beyond = outlook(result, 8192)
    assert beyond is not None
    assert "micro batch" in beyond.faster or "more memory would not help" in beyond.faster
    assert headroom_bytes(result) is not None


def test_a_variation_that_the_model_does_not_have_is_passed_over() -> None:
    unsupported = Failure(
        phase="prepare", exception="autotune.workload.build.UnsupportedModel", message="attention sdpa: stays eager"
    )

    def refuses_full(request: ProbeRequest) -> Failure | None:
        return unsupported if request.config.gradient_checkpointing == "full" else None

    result = Scene(executor=FakeExecutor(failure=refuses_full)).fit()
    assert result.status is FitStatus.FITTED
    assert result.proof is not None
    assert result.proof.config.gradient_checkpointing != "full"


def test_after_a_proof_out_of_memory_only_smaller_configs_are_proven() -> None:
    def tight_proof(request: ProbeRequest) -> Failure | None:
        if request.proof and Law().peak_bytes(request.config) > 700 * MIB:
            return Failure(
                phase="evaluate", exception="RuntimeError", message="DefaultCPUAllocator: can't allocate memory"
            )
        return None

    scene = Scene(executor=FakeExecutor(failure=tight_proof))
    result = scene.fit()
    peaks = [Law().peak_bytes(request.config) for request in scene.executor.requests if request.proof]
    assert peaks == sorted(peaks, reverse=True)
    assert result.proof is not None
    assert peaks[-1] <= 700 * MIB


@dataclass
class Seer:
    """A predictor of memory alone, as for a card that no catalogue has: the fake executor's law, `factor` times too
    high, under a limit."""

    limit_bytes: int
    factor: float = 1.0
    learned: list[TrialRecord] = field(default_factory=list)

    def predict(self, config: TrainingConfig) -> Prediction | None:
        return Prediction(peak_allocated_bytes=round(Law().peak_bytes(config) * self.factor))

    def hopeless(self, config: TrainingConfig) -> bool:
        return Law().peak_bytes(config) * self.factor > self.limit_bytes

    def learn(self, trial: TrialRecord) -> None:
        self.learned.append(trial)

    @property
    def allowed_bytes(self) -> int | None:
        return self.limit_bytes

    def prepare(self, configs: Iterable[TrainingConfig]) -> None:
        """There is nothing to make."""

    def at_hand(self, config: TrainingConfig) -> bool:
        return True

    def seconds(self, config: TrainingConfig) -> Mapping[str, float] | None:
        return None

    def expect(self, config: TrainingConfig) -> Prediction | None:
        return self.predict(config)


def test_what_cannot_fit_is_skipped_and_the_answer_is_the_same() -> None:
    blind = Scene(request=limited(900))
    seeing = Scene(request=limited(900), predictor=Seer(900 * MIB))
    without, with_it = blind.fit(), seeing.fit()
    assert without.out_of_memory > with_it.out_of_memory == 0
    assert seeing.watcher.skipped
    assert with_it.proof is not None
    assert without.proof is not None
    assert with_it.proof.config == without.proof.config
    assert any("predicted not to fit" in note for note in with_it.notes)


def test_what_is_skipped_is_no_probe_of_those_allowed() -> None:
    scene = Scene(request=limited(900), predictor=Seer(900 * MIB))
    result = scene.fit(max_probes=3)
    assert scene.watcher.skipped
    assert result.probes == 3 + 1  # and the proof


def test_every_trial_keeps_what_was_predicted_before_it_and_teaches_the_predictor() -> None:
    scene = Scene(predictor=Seer(1500 * MIB))
    scene.fit()
    predicted = [trial.prediction for trial in scene.store.rows]
    assert all(predicted)
    assert scene.predictor.learned == scene.watcher.shown


def test_predictions_that_leave_nothing_are_held_against_a_probe_and_given_up() -> None:
    blind = Scene(request=limited(900))
    misled = Scene(request=limited(900), predictor=Seer(900 * MIB, factor=100.0))
    without, with_it = blind.fit(), misled.fit()
    assert with_it.proof is not None
    assert without.proof is not None
    assert with_it.proof.config == without.proof.config


def test_what_is_predicted_not_to_fit_and_does_not_is_seen_once() -> None:
    scene = Scene(request=limited(1), predictor=Seer(1 * MIB))
    result = scene.fit()
    assert result.status is FitStatus.NOTHING_FITS
    assert len(scene.executor.requests) == 1
    (seen,) = scene.executor.requests
    assert seen.config.micro_batch_size == 1
