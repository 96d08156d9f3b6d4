"""Pictures of a forecast, from a trace made by hand."""

from __future__ import annotations

import pickle
import re
import xml.dom.minidom
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from autotune.predict.context import Context
from autotune.predict.forecast import Forecast, Target, forecast
from autotune.predict.kernels import KernelSet
from autotune.predict.memory import forecast_memory
from autotune.predict.plot import _samples, svg_of_step, svg_of_sweep, viewer_snapshot
from autotune.predict.trace import Block, Resident, Size, Trace
from autotune.values import MIB, TrainingConfig

CONFIG = TrainingConfig(sequence_length=1024, micro_batch_size=2)


def a_trace() -> Trace:
    """8 MiB of weights; a forward that makes 1 KiB a token, a backward that makes a gradient and frees the rest."""
    forward = Block(name="begin", index=None, sizes=[0], parts=["layer activations"], operators=["aten.mm"], events=[0])
    backward = Block(
        name="backward_begin", index=None, sizes=[1], parts=["gradients"], operators=["aten.mm"], events=[0, ~0],
        deaths=[(0, 0)],
    )  # fmt: skip
    step = Block(
        name="optimizer", index=None, sizes=[1], parts=["optimizer state"], operators=["aten.zeros"], events=[0]
    )
    return Trace(
        sizes=[Size(5, Fraction(1024)), Size(0, Fraction(MIB))],
        programs={"first": [forward, backward], "next": [forward, backward], "evaluate": [forward]},
        optimizer=[[step], [Block(name="optimizer", index=None)]],
        residents=[Resident(8 * MIB, "base weights"), Resident(MIB, "adapters")],
        loops={},
        parameters=1,
        unquantized_bytes=0,
        vocab_size=2,
    )


CONTEXT = Context(low_bytes=2 * MIB, likely_bytes=3 * MIB, high_bytes=4 * MIB, source="made up")


def drawn(config: TrainingConfig = CONFIG, **facts: Any) -> tuple[str, Forecast, float]:
    """The picture, its forecast, and bytes at the top of the stack as drawn."""
    stated: dict[str, Any] = {"kernels": KernelSet(cublas_workspace_bytes=0), "capacity_bytes": 64 * MIB, **facts}
    target = Target(name="A card", context=CONTEXT, others_bytes=5 * MIB, **stated)
    found = forecast(a_trace(), config, target)
    svg = svg_of_step(a_trace(), found, target, title="A & B <tiny>")
    places = [[float(at.split(",")[1]) for at in line.split()] for line in re.findall(r'polygon points="([^"]+)"', svg)]
    bottom, top = max(map(max, places)), min(map(min, places))
    dashed = [float(y) for y in re.findall(r'y1="([\d.]+)" y2="[\d.]+" stroke="#333"', svg)]
    return svg, found, found.device_used_bytes * (bottom - top) / (bottom - dashed[0])


def test_a_step_is_drawn_with_every_part_and_the_card() -> None:
    svg, _, _ = drawn()
    xml.dom.minidom.parseString(svg)
    for words in (
        "base weights",
        "layer activations",
        "gradients",
        "optimizer state",
        "CUDA context",
        "other programs",
        "0.1 GiB to fit in",
        "reserved at the peak",
        "what the allocator caches is not drawn",
        "A &amp; B &lt;tiny&gt;",
    ):
        assert words in svg


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_stack_is_what_the_card_would_show_apart_from_the_allocators_cache(factor: float) -> None:
    _, found, highest = drawn(memory_factor=factor)
    cached = found.memory.peak_reserved_bytes - found.memory.peak_allocated_bytes
    assert highest == pytest.approx(found.device_used_bytes - cached, rel=0.005)
    assert highest == pytest.approx((3 + 5 + factor * 13) * MIB, rel=0.005)  # context, others, tensors


@pytest.mark.parametrize(("capacity", "fits"), [(64 * MIB, True), (20 * MIB, False)])
def test_what_does_not_fit_is_drawn_past_the_cards_line(capacity: int, fits: bool) -> None:
    svg, found, _ = drawn(capacity_bytes=capacity, headroom_bytes=MIB)
    (card,), (peak,) = (re.findall(rf'y1="([\d.]+)" y2="[\d.]+" stroke="{c}"', svg) for c in ("#c00", "#333"))
    assert found.fits is fits
    assert (float(card) < float(peak)) is fits  # up is less
    assert "to fit in, with some kept free" in svg


def test_a_frontier_marks_what_does_not_fit() -> None:
    svg = svg_of_sweep([(512, 4.0, 100.0, True), (1024, 9.0, None, False)], x_name="tokens", title="t")
    xml.dom.minidom.parseString(svg)
    assert svg.count('fill="white"/>') == 2  # the background, and the point that does not fit
    assert "1,024" in svg


def test_the_viewers_history_frees_what_it_allocated_but_the_survivors() -> None:
    events = pickle.loads(viewer_snapshot(a_trace(), CONFIG, KernelSet()))["device_traces"][0]
    live: dict[int, int] = {}
    for event in events:
        if event["action"] == "alloc":
            assert event["addr"] not in live
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
    assert sorted(live.values()) == [MIB, MIB, 8 * MIB]  # adapters, gradient, weights


def test_parts_of_a_trace_made_by_hand_sum_to_its_peak() -> None:
    found = forecast_memory(a_trace(), CONFIG, KernelSet(cublas_workspace_bytes=0))
    assert found.after_load_bytes == 9 * MIB
    assert found.peak_allocated_bytes == sum(found.parts.values()) == (8 + 1 + 1 + 2 + 1) * MIB
    assert found.parts["layer activations"] == 2 * MIB


def test_accumulated_gradients_show_in_the_highest_moment() -> None:
    config = replace(CONFIG, gradient_accumulation_steps=2)
    highest = max(sum(sample.values()) for sample in _samples(a_trace(), config, KernelSet()))
    assert highest == forecast_memory(a_trace(), config, KernelSet()).peak_allocated_bytes


def test_torch_reads_the_history_and_its_frames_name_operators() -> None:
    from torch.cuda import _memory_viz

    history = pickle.loads(viewer_snapshot(a_trace(), CONFIG, KernelSet()))
    assert "aten.mm" in {frame["name"] for event in history["device_traces"][0] for frame in event["frames"]}
    assert _memory_viz.trace(history)
    assert _memory_viz.segsum(history)
