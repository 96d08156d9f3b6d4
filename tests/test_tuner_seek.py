"""The flow with predictions: fewer probes, racing, budgets, earlier trials, proofs that are overtaken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.errors import Interrupted, InvalidRequest
from autotune.tuner import LEAST_PROBE_S
from autotune.values import MIB, Device, FitStatus, Origin, Preserves, ProbeReport, ProbeRequest, Upcast, Verdict
from tests.fakes import FakeExecutor, FakePredictor, Law, MemoryStore, a_gpu
from tests.test_tuner import Scene, limited

LAW = Law()


def a_scene(mib: int = 900, *, store: MemoryStore | None = None, device: Device | None = None, **changes: Any) -> Scene:
    """A card whose tensors are all that its limit is compared with, and a predictor of it."""
    executor = changes.pop("executor", None) or FakeExecutor(law=LAW)
    request = limited(mib, upcast=Upcast.FP32, **changes)
    predictor = FakePredictor(law=LAW, allowed_bytes=mib * MIB, time_error=0.7)
    return Scene(
        executor=executor, store=store or MemoryStore(), device=device or a_gpu(), request=request, predictor=predictor
    )


def test_predictions_save_probes_and_out_of_memory() -> None:
    seeing, blind = a_scene(), a_scene()
    blind.predictor = None
    with_it, without = seeing.fit(), blind.fit()
    assert with_it.probes < without.probes
    assert with_it.out_of_memory == 0
    assert with_it.proof is not None
    assert without.proof is not None
    assert (with_it.proof.tokens_per_second or 0) >= 0.99 * (without.proof.tokens_per_second or 0)


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_search_goes_on_from_what_it_measured(after: int) -> None:
    whole = a_scene().fit()
    scene = a_scene(executor=FakeExecutor(law=LAW, interrupt_after=after))
    with pytest.raises(Interrupted):
        scene.fit()
    scene.executor.interrupt_after = None
    rest = scene.fit()
    assert rest.probes == whole.probes - after
    assert rest.proof is not None
    assert whole.proof is not None
    assert rest.proof.config == whole.proof.config


def test_trials_under_another_limit_are_started_from() -> None:
    """What a config took under a wider limit holds under a narrower one, and how fast it was in any case."""
    first = a_scene(1500)
    first.fit()
    fresh, after = a_scene(1300), a_scene(1300, store=first.store)
    alone, warm = fresh.fit(), after.fit()
    assert warm.probes < alone.probes
    assert warm.proof is not None
    assert alone.proof is not None
    assert (warm.proof.tokens_per_second or 0) >= 0.99 * (alone.proof.tokens_per_second or 0)
    assert warm.proof.memory_limit_bytes == 1300 * MIB


def test_trials_of_another_environment_are_not_started_from() -> None:
    first = a_scene(1500)
    first.fit()
    for number, trial in enumerate(first.store.rows):
        first.store.rows[number] = replace(trial, environment=replace(trial.environment, torch="1.0"))
    assert a_scene(1300, store=first.store).fit().probes == a_scene(1300).fit().probes


def test_a_probe_is_told_what_it_has_to_beat() -> None:
    scene = a_scene()
    result = scene.fit()
    first, second = scene.executor.requests[:2]
    assert first.beat_s is None
    assert second.beat_s is not None
    best = result.trials[0].tokens_per_second
    assert best is not None
    tokens = second.config.micro_batch_size * second.config.sequence_length
    assert second.beat_s == pytest.approx(tokens / best, rel=0.01)
    assert all(request.beat_s is None for request in scene.executor.requests if request.proof)


def test_a_budget_ends_the_search_and_leaves_time_for_the_proof() -> None:
    scene = a_scene(3000)
    unlimited = a_scene(3000).fit()
    result = scene.fit(budget_s=LEAST_PROBE_S)
    assert result.status is FitStatus.FITTED
    assert result.probes < unlimited.probes
    assert any("budget" in note for note in result.notes)
    assert scene.executor.requests[-1].proof


def test_a_budget_too_small_for_one_probe_is_refused_before_anything_runs() -> None:
    scene = a_scene()
    with pytest.raises(InvalidRequest, match=r"--budget 1s is too small for one probe, which takes about 3 s here"):
        scene.fit(budget_s=1.0)
    assert scene.executor.requests == []


def test_a_proof_that_is_slower_than_believed_lets_the_next_config_be_proven() -> None:
    class Disturbed(FakeExecutor):
        """Of the first config that is proven the proof is half as fast as its probe."""

        victim: Any = None

        def probe(self, request: ProbeRequest, *, fresh: bool = False) -> ProbeReport:
            report = super().probe(request, fresh=fresh)
            if not request.proof:
                return report
            Disturbed.victim = Disturbed.victim or request.config
            if request.config != Disturbed.victim:
                return report
            return replace(report, micro_batch_times_s=tuple(2 * time for time in report.micro_batch_times_s))

    scene = a_scene(3000, executor=Disturbed(law=LAW))
    result = scene.fit()
    proofs = [trial for trial in result.trials if trial.origin is Origin.PROOF]
    assert len(proofs) == 2
    assert result.proof == proofs[1]
    assert proofs[0].config == Disturbed.victim
    assert any("the next config was proven too" in note for note in result.notes)
    known = scene.fit()
    assert (known.probes, known.from_database, known.proof) == (0, True, result.proof)


def test_of_two_proofs_of_a_fit_the_faster_is_the_known_answer_whichever_came_last() -> None:
    scene = a_scene(3000)
    first = scene.fit()
    assert first.proof is not None
    slower = replace(
        first.proof, report=replace(first.proof.report, micro_batch_times_s=(99.0,)), config=first.trials[0].config
    )
    scene.store.append(slower)
    assert scene.fit().proof == first.proof


def test_every_trial_names_the_moves_that_lead_to_it() -> None:
    result = a_scene().fit()
    taken = {name for trial in result.trials for name in trial.moves}
    assert "no_fp32_copies" in taken
    assert all(move.preserves is Preserves.EXACT for move in result.moves)


def test_nothing_that_fits_is_seen_once_and_said() -> None:
    result = a_scene(20).fit()
    assert result.status is FitStatus.NOTHING_FITS
    assert result.probes == 1
    assert result.trials[0].judgement.verdict is Verdict.DEVICE_OOM
