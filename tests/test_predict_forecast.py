"""Memory on a card that others use too, under a limit, and on GPUs that the catalogue does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.cli.estimate_question import with_headroom
from autotune.hardware.cards import Card, cards, find_card
from autotune.predict.context import context_of, context_of_capability
from autotune.predict.forecast import Forecast, Target, cannot_fit, cpu_target, forecast, target_of_card
from autotune.predict.kernels import kernels_of
from autotune.probe.predictor import target_of_device
from autotune.values import GIB, MIB, Device
from tests.fakes import a_cpu, a_gpu
from tests.test_predict_plot import CONFIG, a_trace

CARD = find_card("RTX 3060 12GB").card
MIG = "1g.10gb"


def a_target(*, limit_gib: float | None = None, others_gib: float = 0, headroom_gib: float = 0) -> Target:
    """A card of 12 GiB."""
    return replace(
        target_of_card(CARD),
        card=None,
        total_bytes=12 * GIB,
        capacity_bytes=round((limit_gib or 12) * GIB),
        others_bytes=round(others_gib * GIB),
        headroom_bytes=round(headroom_gib * GIB),
    )


@pytest.mark.parametrize(
    ("limit", "others", "headroom", "ours"),
    [
        (None, 0, 0, 12),
        (None, 3, 0.25, 8.75),  # the whole card, less what others hold
        (8, 0, 0, 8),
        (8, 3, 0, 8),  # others' memory is not of our limit,
        (8, 6, 0.25, 5.75),  # but must find room on the card
    ],
)
def test_what_is_left_for_a_run(limit: float | None, others: float, headroom: float, ours: float) -> None:
    target = a_target(limit_gib=limit, others_gib=others, headroom_gib=headroom)
    assert target.allowed_bytes == round((ours + others) * GIB)


def forecast_of(target: Target) -> Forecast:
    return forecast(a_trace(), CONFIG, target)


@pytest.mark.parametrize(("others", "fits"), [(0, True), (3, True), (11.9, False)])
def test_a_run_that_a_probe_would_finish_is_predicted_to_fit(others: float, fits: bool) -> None:
    """A probe's allocator may hold the limit less the context, whatever others hold (probe/run.py)."""
    own = forecast_of(a_target()).device_used_bytes
    target = a_target(limit_gib=own / GIB, others_gib=others)
    found = forecast_of(target)
    assert found.device_used_bytes == own + target.others_bytes
    assert found.fits is fits
    assert cannot_fit(found) is not fits
    assert forecast_of(replace(target, capacity_bytes=own - 20 * MIB)).fits is False


def test_a_cpus_limit_is_all_there_is() -> None:
    assert cpu_target("CPU", GIB).allowed_bytes == GIB
    assert cpu_target("CPU", None).allowed_bytes is None
    assert not cannot_fit(forecast_of(cpu_target("CPU", None)))


@pytest.mark.parametrize("card", [card for card in cards() if card.compute_capability], ids=lambda card: card.name)
def test_kernels_of_a_capability_are_those_of_its_cards(card: Card) -> None:
    target = target_of_card(card)
    assert kernels_of(card.vendor, card.compute_capability) == target.kernels


@pytest.mark.parametrize(
    ("vendor", "capability", "flash", "efficient", "grouped"),
    [
        ("nvidia", None, True, True, True),
        ("nvidia", "5.2", False, True, False),
        ("nvidia", "13.0", True, True, True),
        ("amd", "gfx1036", False, False, True),
        ("intel", None, False, False, True),
    ],
)
def test_kernels_of_what_no_card_has(
    vendor: str, capability: str | None, flash: bool, efficient: bool, grouped: bool
) -> None:
    found = kernels_of(vendor, capability)
    assert (found.sdpa_flash, found.sdpa_efficient, found.grouped_mm) == (flash, efficient, grouped)


@pytest.mark.parametrize(
    ("device", "workspace"),
    [
        (a_gpu(80, "NVIDIA X100", compute_capability="9.0"), 32 * MIB),
        (a_gpu(10, "NVIDIA A100 80GB PCIe MIG 1g.10gb", compute_capability="8.0"), 8_519_680),
        (a_gpu(10, "NVIDIA A100-SXM4-80GB", compute_capability="8.0", mig=MIG), 8_519_680),  # as NVML names a slice
        (a_gpu(8, "NVIDIA Y1", compute_capability="99.0"), 8_519_680),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else "",
)
def test_a_gpu_that_is_not_in_the_catalogue_has_a_context_kernels_and_headroom(device: Device, workspace: int) -> None:
    target = target_of_device(device, None)
    assert target.card is None
    assert target.context is not None
    assert 0 < target.context.low_bytes < target.context.likely_bytes < target.context.high_bytes
    assert target.kernels.cublas_workspace_bytes == workspace
    assert with_headroom(target).headroom_bytes >= 256 * MIB
    assert forecast_of(target).device_used_bytes > target.context.likely_bytes


def test_a_cpu_keeps_no_headroom() -> None:
    assert with_headroom(target_of_device(a_cpu(), GIB)).headroom_bytes == 0


def test_a_card_of_the_catalogue_is_what_it_is_there() -> None:
    target = target_of_device(a_gpu(free_bytes=10 * GIB), 8 * GIB)
    assert (target.card, target.context) == (CARD, context_of(CARD))
    assert (target.capacity_bytes, target.total_bytes, target.others_bytes) == (8 * GIB, 12 * GIB, 2 * GIB)


def test_a_context_by_capability_holds_those_of_its_cards_and_less() -> None:
    found = context_of_capability("8.0")
    whole = context_of(find_card("A100 80GB").card)
    assert found.low_bytes < whole.low_bytes < whole.high_bytes <= found.high_bytes
    assert "8.0" in found.source
    assert "not measured" in context_of_capability(None).source
