"""The page of every model on every card: what a cell says, how the page is laid out. No prediction is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from autotune.hardware.cards import cards
from autotune.predict.forecast import Forecast
from autotune.predict.memory import MemoryForecast
from autotune.values import GIB, AllocatorSetting, ModelSource, TrainingConfig
from autotune.workload.models import catalogue
from benchmarks.estimate_table import COLUMNS, Shape, cell, page, shapes, short

EXPANDABLE = AllocatorSetting.EXPANDABLE_SEGMENTS


def a_forecast(*, fits: bool, allocator: AllocatorSetting = AllocatorSetting.DEFAULT) -> Forecast:
    config = TrainingConfig(
        sequence_length=1000, micro_batch_size=4, gradient_accumulation_steps=4, allocator=allocator
    )
    memory = MemoryForecast(
        after_load_bytes=GIB,
        forward_peak_allocated_bytes=GIB,
        peak_allocated_bytes=2 * GIB,
        peak_reserved_bytes=3 * GIB,
        training_peak_allocated_bytes=2 * GIB,
        evaluation_peak_allocated_bytes=GIB,
    )
    return Forecast(
        config=config,
        memory=memory,
        device_used_bytes=1234 * GIB,
        step_time_s=12.0,
        intervals={},
        capacity_bytes=16 * GIB,
        fits=fits,
    )


def test_a_cell_is_speed_and_micro_batch_or_the_least_memory_in_brackets() -> None:
    assert cell(a_forecast(fits=True)) == "1,333 4"
    assert cell(a_forecast(fits=True, allocator=EXPANDABLE)) == "1,333 4e"
    assert cell(a_forecast(fits=False)) == "(1,234)"


def test_shapes_have_every_built_in_model_once_and_no_shape_twice() -> None:
    found = shapes()
    assert Counter(name for shape in found for name in shape.names) == Counter(
        entry.id for entry in catalogue().values()
    )
    assert len({shape.source.fingerprint for shape in found}) == len(found)


def test_the_page_has_a_table_of_every_few_models_with_a_row_a_card() -> None:
    made = [
        Shape(source=ModelSource(name=f"owner/m{n}", config={}), names=(f"owner/m{n}",)) for n in range(COLUMNS + 1)
    ]
    made[0] = Shape(source=made[0].source, names=("owner/m0", "owner/same"))
    text = page([(shape, {card.name: f"cell of {shape.names[0]}" for card in cards()}) for shape in made])
    assert f"each of the {COLUMNS + 1}\nshapes among the {COLUMNS + 2} built-in models" in text
    assert f"## m0 to m{COLUMNS - 1}\n\n| card | m0 | m1 |" in text
    assert f"## m{COLUMNS} to m{COLUMNS}\n\n| card | m{COLUMNS} |\n" in text
    for card in cards():
        assert text.count(f"| {card.name} | ") == 2
    assert text.count("cell of owner/m3") == len(cards())
    assert text.endswith("## Models of one shape\n\n- owner/m0: owner/same\n")


def test_the_page_has_every_model_on_every_card() -> None:
    page = (Path(__file__).parents[1] / "docs" / "estimates.md").read_text(encoding="utf-8")
    for entry in catalogue():
        assert short(entry) in page, entry
    sections = -(-len(shapes()) // COLUMNS)
    for card in cards():
        rows = [line for line in page.splitlines() if line.startswith(f"| {card.name} |")]
        assert len(rows) == sections
        assert sum(row.count("|") - 2 for row in rows) == len(shapes())
        assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))
