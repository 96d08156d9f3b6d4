from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from autotune.protocols import ProbeExecutor
from autotune.search.climb import Observation, Outcome, climb
from autotune.search.space import build_space
from autotune.search.study import Search
from autotune.values import FitRequest, ProbeRequest, TrainingConfig, Upcast, from_json
from strategies import LADDER
from tests.fakes import FakeExecutor, Law, a_cpu, a_request, observe

MIB = 2**20
Recorded = dict[TrainingConfig, Observation]


def a_search(request: FitRequest | None = None, recorded: Recorded | None = None, **options: Any) -> Search:
    request = request or a_request(gradient_accumulation_steps=16, upcast=Upcast.FP32)
    device = a_cpu()
    space = build_space(request, device)
    return Search(space, climb(space, LADDER, request, device, **options), recorded)


def finish(search: Search, limit_mib: int = 700, law: Law | None = None) -> tuple[Outcome, Recorded]:
    """Measure all that is asked. The observations are in the order they were made."""
    made: Recorded = {}
    while (proposal := search.ask()) is not None:
        made[proposal.config] = observe(law or Law(), proposal.config, limit_mib * MIB)
        search.tell(proposal, made[proposal.config])
    return search.outcome(), made


@settings(max_examples=40, deadline=None)
@given(st.integers(190, 3000), st.integers(100_000, 3_000_000), st.data())
def test_interrupted_search_goes_on_where_it_was(limit_mib: int, activation_bytes: int, data: st.DataObject) -> None:
    law = Law(activation_bytes_per_token=activation_bytes)
    whole, made = finish(a_search(), limit_mib, law)
    kept = data.draw(st.integers(0, len(made)), label="kept")
    resumed, rest = finish(a_search(recorded=dict(list(made.items())[:kept])), limit_mib, law)
    assert resumed == whole
    assert list(rest) == list(made)[kept:]


def test_recorded_trials_count_as_probes() -> None:
    _, made = finish(a_search())
    recorded = dict(list(made.items())[:-1])
    assert len(finish(a_search(recorded=recorded))[1]) == 1
    outcome, rest = finish(a_search(recorded=recorded, max_probes=len(recorded)))
    assert rest == {}
    assert outcome.stopped == f"stopped after {len(recorded)} probes, the most allowed"


def test_probed_search_finds_what_its_law_says() -> None:
    search, executor = a_search(), FakeExecutor()
    while (proposal := search.ask()) is not None:
        search.tell(proposal, probe(executor, search.space.request, proposal.config))
    expected, made = finish(a_search())
    assert [item.config for item in search.outcome().ranked] == [item.config for item in expected.ranked]
    assert (executor.probes, executor.out_of_memory) == (len(made), sum(item.out_of_memory for item in made.values()))


def probe(executor: ProbeExecutor, request: FitRequest, config: TrainingConfig) -> Observation:
    report = executor.probe(
        ProbeRequest(model=request.model, config=config, device="cpu", memory_limit_bytes=700 * MIB)
    )
    if report.failure is not None:
        assert "DefaultCPUAllocator: can't allocate memory" in report.failure.message
        return Observation(config, False, True, None, None, None)
    step_s = report.step_time_s(config.gradient_accumulation_steps)
    assert step_s is not None
    return Observation(config, True, False, config.tokens_per_step / step_s, 0.0, report.peak_allocated_bytes)


def test_study_holds_every_trial_once_and_the_fastest_as_its_best() -> None:
    search = a_search()
    outcome, made = finish(search)
    trials = search.study.trials
    assert [from_json(TrainingConfig, trial.user_attrs["config"]) for trial in trials] == list(made)
    assert search.study.best_value == max(item.speed for item in outcome.ranked)
    assert all(trial.params["micro_batch_size"] for trial in trials)


def test_out_of_memory_is_a_failed_trial_with_its_verdict() -> None:
    search = a_search()
    _, made = finish(search)
    states = {trial.user_attrs["verdict"]: trial.state for trial in search.study.trials}
    assert any(item.out_of_memory for item in made.values())
    assert states == {"fits": TrialState.COMPLETE, "out_of_memory": TrialState.FAIL}


def test_rebuilt_study_equals_the_one_that_was_measured() -> None:
    first = a_search()
    _, made = finish(first)
    again = a_search(recorded=made)
    assert again.ask() is None
    assert [(t.params, t.values, t.state) for t in again.study.trials] == [
        (t.params, t.values, t.state) for t in first.study.trials
    ]


def test_asking_twice_is_the_same_question() -> None:
    search = a_search()
    assert search.ask() == search.ask()
    assert len(search.study.trials) == 1


def test_only_the_pending_proposal_can_be_told() -> None:
    search = a_search()
    proposal = search.ask()
    assert proposal is not None
    search.tell(proposal, observe(Law(), proposal.config, 700 * MIB))
    with pytest.raises(ValueError, match="asked last"):
        search.tell(proposal, observe(Law(), proposal.config, 700 * MIB))


def test_unfinished_search_has_an_outcome_so_far() -> None:
    search = a_search()
    proposal = search.ask()
    assert proposal is not None
    search.tell(proposal, observe(Law(), proposal.config, 10_000 * MIB))
    assert search.outcome().stopped == "not finished"
    assert search.outcome().best is not None


def test_setting_unknown_to_the_study_is_kept_in_its_attributes() -> None:
    request = a_request(gradient_checkpointing="every_7", optimizer="lion_8bit")
    search = a_search(request)
    finish(search, 100_000)
    config = from_json(TrainingConfig, search.study.trials[0].user_attrs["config"])
    assert (config.gradient_checkpointing, config.optimizer) == ("every_7", "lion_8bit")


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    finish(a_search())
    finish(a_search(), 1)
    assert capfd.readouterr() == ("", "")
