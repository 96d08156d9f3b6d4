from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autotune.consent import SHORTEST, consents
from autotune.search.climb import Observation
from autotune.search.space import build_space, least_memory, needs_at_least
from autotune.values import GIB, MIB, Consent, LossPath, TrainingConfig, Upcast
from strategies import LADDER
from tests.fakes import FakePredictor, Law, a_cpu, a_gpu, a_request, observe

LAW = Law(weights_bytes=600 * MIB, activation_bytes_per_token=2_000_000, full_checkpointing_keeps=0.5)


class LawOfAdapters(Law):
    """Rank, modules, and 8-bit states take memory too."""

    def peak_bytes(self, config: TrainingConfig) -> int:
        modules = 1.0 if config.target_modules == ("all-linear",) else 0.3
        states = 0.4 if "8bit" in config.optimizer else 1.0
        return Law.peak_bytes(self, config) + round(config.lora_rank * 8 * MIB * modules * states)


def of_kind(
    limit_mib: int, law: Law = LAW, observations: tuple[Observation, ...] = (), **changes: Any
) -> dict[str, Consent]:
    limit = limit_mib * MIB
    request = a_request(**{"memory_limit_bytes": limit, "sequence_length": 1024, **changes})
    found = consents(request, a_gpu(), observations, FakePredictor(law=law, allowed_bytes=limit), ladder=LADDER)
    assert len({one.kind for one in found}) == len(found)
    return {one.kind: one for one in found}


def test_the_longest_length_that_is_likely_to_fit_is_offered() -> None:
    found = of_kind(1100)["shorter_sequence"]
    assert found.fits
    assert found.option == f"--min-sequence-length {found.config.sequence_length}"
    peaks = [LAW.peak_bytes(replace(found.config, sequence_length=length)) / MIB for length in (512, 1024)]
    assert peaks[0] < 1100 < peaks[1]
    assert found.config.sequence_length == 512


def test_a_limit_is_offered_under_which_the_config_that_needs_least_fits() -> None:
    found = of_kind(1100)["more_memory"]
    assert found.option is not None
    limit = int(found.option.removeprefix("--memory-limit ").removesuffix("MiB")) * MIB
    assert LAW.peak_bytes(found.config) < found.needed_bytes <= limit < 1.2 * LAW.peak_bytes(found.config)
    assert found.config.sequence_length == 1024
    assert of_kind(limit // MIB) == {}  # likely to fit as it is: nothing has to be allowed


def test_each_consent_is_tried_by_itself() -> None:
    law = LawOfAdapters(weights_bytes=600 * MIB, activation_bytes_per_token=200_000)
    found = of_kind(900, law, sequence_length=256, lora_rank=32)
    assert {kind: one.option for kind, one in found.items() if one.fits and kind != "more_memory"} == {
        "lower_rank": "--min-lora-rank 16",
        "fewer_modules": "--allow-fewer-modules",
        "near": "--allow near",
    }
    assert found["shorter_sequence"].fits is False
    assert found["shorter_sequence"].config.sequence_length == SHORTEST
    assert found["shorter_sequence"].needed_bytes > 900 * MIB
    assert found["lower_rank"].config.sequence_length == 256
    assert found["near"].config.optimizer == "adamw_bnb_8bit"


def test_what_is_given_is_not_offered_again_and_is_used() -> None:
    law = LawOfAdapters(weights_bytes=600 * MIB, activation_bytes_per_token=200_000)
    given: dict[str, Any] = {"allow_near": True, "allow_fewer_modules": True, "min_lora_rank": 1}
    found = of_kind(650, law, sequence_length=256, **given)
    assert list(found) == ["shorter_sequence", "more_memory"]
    assert found["more_memory"].config.lora_rank == 1
    assert len(found["more_memory"].config.target_modules) > 1


def test_a_narrowed_search_may_be_what_is_in_the_way() -> None:
    found = of_kind(1800, fixed=(("gradient_checkpointing", "off"),))
    assert found["wider_search"].fits
    assert found["wider_search"].config.gradient_checkpointing != "off"
    assert "wider_search" not in of_kind(1100)


def test_more_than_the_card_has_is_no_limit_to_give() -> None:
    law = Law(weights_bytes=14 * GIB)
    found = of_kind(11 * 1024, law)
    assert found["more_memory"].option is None
    assert found["more_memory"].needed_bytes > 14 * GIB
    assert [one.fits for kind, one in found.items() if kind != "more_memory"] == [False] * (len(found) - 1)


def test_what_was_measured_corrects_what_is_offered() -> None:
    """Predicted are 0.6 of the truth: by predictions alone 1,024 tokens would fit, and a probe says they do not."""
    limit = 1100 * MIB
    request = a_request(memory_limit_bytes=limit, sequence_length=1024)
    predictor = FakePredictor(law=LAW, allowed_bytes=limit, memory_error=0.6)
    config = least_memory(build_space(request, a_gpu()))[0]
    ran_out = replace(observe(LAW, config, limit), wanted_bytes=LAW.peak_bytes(config))
    trusted = consents(request, a_gpu(), (), predictor, ladder=LADDER)
    taught = consents(request, a_gpu(), (ran_out,), predictor, ladder=LADDER)
    assert trusted == ()  # likely to fit as it is
    needed = {one.kind: one.needed_bytes for one in taught}
    assert needed["more_memory"] > LAW.peak_bytes(config)


def test_nothing_is_said_where_nothing_can_be_predicted() -> None:
    request = a_request(memory_limit_bytes=MIB)
    untraceable = FakePredictor(allowed_bytes=MIB, is_traceable=lambda config: False)
    assert consents(request, a_cpu(), (), untraceable, ladder=LADDER) == ()
    assert consents(request, a_cpu(), (), FakePredictor(allowed_bytes=None), ladder=LADDER) == ()


def test_what_cannot_be_traced_is_stood_in_for_by_something_plainer() -> None:
    limit = 1100 * MIB
    request = a_request(memory_limit_bytes=limit, sequence_length=1024)
    predictor = FakePredictor(
        law=LAW, allowed_bytes=limit, is_traceable=lambda config: config.gradient_checkpointing != "offload"
    )
    found = consents(request, a_gpu(), (), predictor, ladder=LADDER)
    assert {one.config.gradient_checkpointing for one in found} == {"full"}


@pytest.mark.parametrize("changes", [{}, {"allow_near": True}, {"upcast": Upcast.FP32, "double_quant": False}])
def test_the_config_that_needs_least_needs_no_more_than_any(changes: dict[str, Any]) -> None:
    space = build_space(a_request(**changes), a_gpu(), installed=("liger_kernel",))
    least = least_memory(space)[0]
    alike = [config for config in space.configs() if config.optimizer == least.optimizer]
    assert least in alike
    assert all(needs_at_least(config, least) for config in alike)
    assert least.loss is LossPath.LIGER


def test_a_rehearsal_counts_what_is_held_beside_tensors() -> None:
    limit = 700 * MIB
    request = a_request(memory_limit_bytes=limit, sequence_length=2048)
    law = Law(activation_bytes_per_token=400_000)
    found = {
        one.kind: one
        for one in consents(request, a_cpu(), (), FakePredictor(law=law, allowed_bytes=limit), ladder=LADDER)
    }
    least = found["more_memory"]
    assert law.peak_bytes(least.config) < limit  # by tensors alone it would fit
    assert least.needed_bytes > law.peak_bytes(least.config) + 900 * MIB
    assert (found["shorter_sequence"].config.sequence_length, found["shorter_sequence"].fits) == (512, True)
