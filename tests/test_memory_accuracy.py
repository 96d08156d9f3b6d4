"""The accuracy benchmark's pure parts: which rows become which configs, and its error arithmetic. No torch."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from autotune.predict.forecast import Forecast
from autotune.predict.memory import MemoryForecast
from autotune.values import GIB, MIB, Attention, Quantization, Trainer, TrainingConfig, Upcast
from benchmarks.memory_accuracy import (
    PUBLISHED,
    Case,
    LeftOut,
    Result,
    against_fitcheck,
    bars,
    case_of,
    compare,
    error_percent,
    fitcheck_errors,
    grade,
    mean_and_worst,
    note_gib,
    read_published,
    report,
    target_of,
    write,
)

NOTES = (
    "[A] peak=torch max_memory_allocated; reserved=6.582 GiB; process(reserved+ctx)=6.720 GiB; after_load=4.719;"
    " fwd_peak=5.697 bwd_peak=6.045; FitCheck error% tensors=1.30 process=-1.22; fp16 compute (T4)"
)


@pytest.fixture(scope="module")
def found() -> list[Case | LeftOut]:
    return [case_of(row) for row in read_published(PUBLISHED)]


def cases(found: list[Case | LeftOut], source: str) -> list[Case]:
    return [case for case in found if isinstance(case, Case) and source in case.source]


def a_case(found: list[Case | LeftOut], quantization: Quantization) -> Case:
    return next(case for case in cases(found, "FitCheck") if case.config.quantization is quantization)


def a_forecast(config: TrainingConfig, *, allocated: float, used: float) -> Forecast:
    memory = MemoryForecast(
        after_load_bytes=GIB,
        forward_peak_allocated_bytes=GIB,
        peak_allocated_bytes=int(allocated),
        peak_reserved_bytes=int(used),
        training_peak_allocated_bytes=int(allocated),
        evaluation_peak_allocated_bytes=GIB,
    )
    return Forecast(
        config=config,
        memory=memory,
        device_used_bytes=int(used),
        step_time_s=None,
        intervals={},
        capacity_bytes=None,
        fits=None,
    )


def a_result(found: list[Case | LeftOut], **errors: float) -> Result:
    return Result(case=a_case(found, Quantization.NF4), predicted={}, errors=errors)


def test_only_rows_graded_a_are_in_the_table_that_a_clone_holds() -> None:
    rows = read_published(PUBLISHED)
    assert len(rows) == 178
    assert {grade(row["notes"]) for row in rows} == {"A"}


def test_other_grades_are_not_read(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("model,notes\na,[A] exact\nb,[B] guessed\nc,no grade\n", encoding="utf-8")
    assert [row["model"] for row in read_published(table)] == ["a"]


def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException):
        read_published(tmp_path / "absent.csv")
    (tmp_path / "other.csv").write_text("x,y\n1,2\n", encoding="utf-8")
    with pytest.raises(click.ClickException):
        read_published(tmp_path / "other.csv")


def test_every_row_is_a_case_or_left_out_with_a_reason(found: list[Case | LeftOut]) -> None:
    assert len(cases(found, "FitCheck")) == 35
    assert len(cases(found, "fms")) == 10
    left = [out for out in found if isinstance(out, LeftOut)]
    assert len(left) == 178 - 45
    assert all(out.reason for out in left)
    assert Counter("litgpt" in out.reason for out in left)[True] == 15


def test_rows_of_several_gpus_and_without_a_number_are_left_out(found: list[Case | LeftOut]) -> None:
    reasons = Counter(out.reason.split(":")[0] for out in found if isinstance(out, LeftOut))
    assert reasons["several GPUs under FSDP"] > 50
    assert reasons["out of memory"] == 2
    assert reasons["GPTQ base weights"] > 0


def test_a_quantised_t4_row_was_prepared_for_k_bit_training_and_a_plain_one_was_not(
    found: list[Case | LeftOut],
) -> None:
    assert a_case(found, Quantization.NF4).config.upcast is Upcast.FP32
    assert a_case(found, Quantization.NONE).config.upcast is Upcast.NONE


def test_t4_rows_ran_a_plain_float16_loop(found: list[Case | LeftOut]) -> None:
    for case in cases(found, "FitCheck"):
        config = case.config
        assert (config.trainer, config.compute_dtype, config.autocast) == (Trainer.LOOP, "float16", False)
        assert config.lora_alpha == 2 * config.lora_rank
        assert config.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
        assert not config.double_quant
        assert not target_of(case).kernels.sdpa_flash
        assert case.no_bar is None


def test_a_boundary_row_is_compared_by_process_alone(found: list[Case | LeftOut]) -> None:
    boundary = [case for case in cases(found, "FitCheck") if set(case.measured) == {"process"}]
    assert [case.config.micro_batch_size for case in boundary] == [6, 7]
    assert boundary[0].measured["process"] == pytest.approx(13.3661 * GIB)
    assert boundary[0].fitcheck == {"process": pytest.approx((13695 * MIB / (13.3661 * GIB) - 1) * 100)}


def test_the_card_of_the_t4_rows_is_the_catalogues(found: list[Case | LeftOut]) -> None:
    target = target_of(cases(found, "FitCheck")[0])
    assert target.capacity_bytes == 14_912 * MIB
    assert target.context is not None
    assert target.context.likely_bytes == 140.875 * MIB


def test_fms_rows_have_no_bar_and_say_why(found: list[Case | LeftOut]) -> None:
    for case in cases(found, "fms"):
        assert case.config.attention is Attention.FLASH_ATTENTION_2
        assert case.config.lora_dropout == 0.1
        assert case.no_bar
        assert ("experts" in case.no_bar) == ("Mixtral" in case.model)
        assert set(case.measured) == {"allocated"}


def test_notes_give_bytes() -> None:
    assert note_gib(NOTES, "reserved") == pytest.approx(6.582 * GIB)
    assert note_gib(NOTES, "process(reserved+ctx)") == pytest.approx(6.720 * GIB)
    assert note_gib(NOTES, "fwd_peak") == pytest.approx(5.697 * GIB)
    assert note_gib(NOTES, "absent") is None
    assert fitcheck_errors(NOTES) == {"allocated": 1.30, "process": -1.22}
    assert fitcheck_errors("[A] nothing") == {}


def test_an_error_is_signed_and_of_what_was_published() -> None:
    assert error_percent(110, 100) == pytest.approx(10)
    assert error_percent(95, 100) == pytest.approx(-5)
    assert mean_and_worst([1, -3, 2]) == (2, 3)
    assert mean_and_worst([]) is None


def test_errors_are_of_allocated_and_of_what_the_card_holds(found: list[Case | LeftOut]) -> None:
    case = a_case(found, Quantization.NF4)
    allocated, used = case.measured["allocated"], case.measured["process"]
    result = compare(case, a_forecast(case.config, allocated=allocated * 1.01, used=used), allocated * 4)
    assert result.errors["allocated"] == pytest.approx(1, abs=1e-6)
    assert result.errors["process"] == pytest.approx(0, abs=1e-6)
    assert result.accelerate == pytest.approx(300)


def test_a_bar_fails_by_its_mean_or_by_its_worst_row(found: list[Case | LeftOut]) -> None:
    def passed(*errors: float) -> bool:
        (bar,) = bars([a_result(found, allocated=error) for error in errors])
        return bar.passed

    assert passed(0.3, -0.3)
    assert not passed(0.5, -0.5)
    assert passed(*[0.0] * 9, 1.9)
    assert not passed(*[0.0] * 9, -2.1)


def test_rows_without_a_bar_count_for_none(found: list[Case | LeftOut]) -> None:
    case = cases(found, "fms")[0]
    assert bars([Result(case=case, predicted={}, errors={"allocated": 50.0})]) == []


def test_fitcheck_is_compared_over_the_rows_that_both_have(found: list[Case | LeftOut]) -> None:
    without = next(case for case in cases(found, "FitCheck") if not case.fitcheck)
    told = a_case(found, Quantization.NF4).fitcheck["allocated"]
    results = [a_result(found, allocated=-0.25), Result(case=without, predicted={}, errors={"allocated": 9.0})]
    assert against_fitcheck(results) == {"allocated": {"rows": 1, "ours": 0.25, "fitcheck": abs(told)}}


def test_a_missed_bar_names_its_rows(found: list[Case | LeftOut]) -> None:
    text = report([a_result(found, allocated=2.5)], [], markdown=False)
    assert "FAIL  FitCheck" in text
    assert f"allocated +2.50 %  {a_case(found, Quantization.NF4).label}" in text


def test_a_second_record_of_a_day_gets_files_of_its_own(found: list[Case | LeftOut], tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    left = [out for out in found if isinstance(out, LeftOut)]
    names = [write(tmp_path, [a_result(found, allocated=0.1)], left, "table.csv", now).name for _ in range(2)]
    assert names == ["memory_accuracy-2026-01-02.json", "memory_accuracy-2026-01-02-2.json"]
    assert "several GPUs" in (tmp_path / "memory_accuracy-2026-01-02.md").read_text(encoding="utf-8")
