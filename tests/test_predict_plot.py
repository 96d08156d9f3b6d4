"""Pictures of a forecast, from a trace made by hand."""

from __future__ import annotations

import pickle
import xml.dom.minidom
from dataclasses import replace
from fractions import Fraction

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
        hidden_size=2,
    )


def test_a_step_is_drawn_with_every_part_and_the_card() -> None:
    svg = svg_of_step(a_trace(), CONFIG, KernelSet(), title="A & B <tiny>", capacity_bytes=64 * MIB)
    xml.dom.minidom.parseString(svg)
    for words in (
        "base weights",
        "layer activations",
        "gradients",
        "optimizer state",
        "the card",
        "A &amp; B &lt;tiny&gt;",
    ):
        assert words in svg


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
