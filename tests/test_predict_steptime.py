from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

from autotune.hardware.cards import Card, find_card
from autotune.predict.steptime import INTERVAL, POWER_CAPPED, Efficiency, bus_bytes_per_s, forecast_time
from autotune.predict.store import TraceStore
from autotune.predict.trace import MONOMIALS, Block, Loop, NotAlike, Size, Trace, WorkSum
from autotune.values import TrainingConfig
from benchmarks import speed_rank
from benchmarks.memory_accuracy import PUBLISHED, read_published

A100 = find_card("A100 SXM 80GB").card
T4 = find_card("T4").card
IDEAL = Efficiency(
    matmul=1.0, flash=1.0, efficient=0.5, memory=1.0, dequantise=0.5, no_bfloat16=0.5, launch_s=0.0, ramp_s=0.0
)
CONFIG = TrainingConfig(sequence_length=1000, micro_batch_size=2, gradient_accumulation_steps=4)


def size(monomial: str, factor: float) -> Size:
    return Size(MONOMIALS.index(monomial), Fraction(factor))


def work(kind: str, dtype: str = "bfloat16", flops: float = 0, moved: float = 0, count: int = 1) -> WorkSum:
    return WorkSum(
        kind=kind,
        dtype=dtype,
        flops=(size("BT", flops),) if flops else (),
        moved=(size("BT", moved),) if moved else (),
        count=count,
    )


def trace(*works: WorkSum, layers: int | None = None, operators: tuple[str, ...] = ()) -> Trace:
    """One block of these works, or `layers` alike of which three are traced."""
    kept = range(3) if layers else [None]
    blocks = [Block(name="forward", index=i, works=list(works), operators=list(operators)) for i in kept]
    return Trace(
        sizes=[],
        programs={"first": blocks},
        optimizer=[[], [Block(name="optimizer", index=None, works=[optimizer_work()])]],
        residents=[],
        loops={"layers": Loop(kept=3, head=1, period=1, total=layers)} if layers else {},
        parameters=0,
        unquantized_bytes=0,
        vocab_size=0,
    )


def optimizer_work() -> WorkSum:
    return WorkSum(kind="memory", dtype="float32", flops=(), moved=(size("1", 2_039_000_000),))


def micro(*works: WorkSum, card: Card = A100, reached: Efficiency = IDEAL, config: TrainingConfig = CONFIG) -> float:
    return forecast_time(trace(*works), config, card, efficiency=reached).micro_batch_s


def test_a_step_is_its_micro_batches_and_one_optimizer() -> None:
    found = forecast_time(trace(work("matmul", flops=1e6), work("memory", moved=1e6)), CONFIG, A100)
    assert found.optimizer_s > 0
    assert found.step_time_s == pytest.approx(4 * found.micro_batch_s + found.optimizer_s)
    assert sum(found.by_kind.values()) == pytest.approx(found.step_time_s)
    assert set(found.by_kind) == {"matmul", "memory", "optimizer"}
    assert (found.low_s, found.high_s) == pytest.approx(
        (found.step_time_s * INTERVAL[0], found.step_time_s * INTERVAL[1])
    )


def test_what_was_learned_of_a_machine_multiplies_all_of_it() -> None:
    made = trace(work("matmul", flops=1e6))
    plain, learned = (forecast_time(made, CONFIG, A100, learned_factor=factor) for factor in (1.0, 1.3))
    assert learned.step_time_s == pytest.approx(1.3 * plain.step_time_s)
    assert learned.optimizer_s == pytest.approx(1.3 * plain.optimizer_s)


def test_a_kernel_takes_the_longest_of_its_flops_its_bytes_and_a_launch() -> None:
    tokens = 2 * 1000
    by_flops = tokens * 1e9 / (A100.bf16_flops_per_s or 0)
    by_bytes = tokens * 1e9 / A100.bandwidth_bytes_per_s
    assert micro(work("matmul", flops=1e9, moved=1)) == pytest.approx(by_flops)
    assert micro(work("matmul", flops=1e9, moved=1e9)) == pytest.approx(by_bytes)
    assert micro(work("memory", moved=1, count=7), reached=replace(IDEAL, launch_s=1e-3)) == pytest.approx(7e-3)


def test_layers_that_were_not_traced_count_as_those_that_were() -> None:
    one = forecast_time(trace(work("matmul", flops=1e6)), CONFIG, A100).micro_batch_s
    whole = forecast_time(trace(work("matmul", flops=1e6), layers=32), CONFIG, A100).micro_batch_s
    assert whole == pytest.approx(32 * one)


def test_float32_products_run_without_tf32() -> None:
    expected = 2000 * 1e9 / A100.fp32_flops_per_s
    assert micro(work("matmul", "float32", flops=1e9)) == pytest.approx(expected)


def test_bfloat16_on_a_card_without_units_is_slower_than_float32() -> None:
    assert T4.bf16_flops_per_s is None
    assert micro(work("matmul", "bfloat16", flops=1e9), card=T4) == pytest.approx(
        2 * micro(work("matmul", "float32", flops=1e9), card=T4)
    )


def test_a_t4_sustains_24_teraflops_in_large_float16_products() -> None:
    reached = Efficiency(ramp_s=0.0, launch_s=0.0)
    seconds = micro(work("matmul", "float16", flops=1e9), card=T4, reached=reached)
    assert 2000 * 1e9 / seconds == pytest.approx(24e12, rel=0.01)


def test_power_caps_name_cards_of_the_catalogue() -> None:
    assert [find_card(name).card.name for name in POWER_CAPPED] == list(POWER_CAPPED)


def test_small_products_reach_less_of_the_rate_and_more_so_on_a_larger_card() -> None:
    def reached(card: Card, flops: float) -> float:
        seconds = micro(work("matmul", "float16", flops=flops), card=card, reached=Efficiency())
        return 2000 * flops / seconds / (card.fp16_flops_per_s * POWER_CAPPED.get(card.name, 1.0))

    shares = [reached(A100, flops) for flops in (1e4, 1e5, 1e6, 1e8)]
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert shares[-1] == pytest.approx(Efficiency().matmul, rel=0.02)
    assert reached(T4, 1e6) > reached(A100, 1e6)


def test_attention_counts_half_its_flops_where_the_kernel_skips_the_rest() -> None:
    product = micro(work("matmul", flops=1e9))
    assert micro(work("flash", flops=1e9)) == pytest.approx(product / 2)
    assert micro(work("efficient", flops=1e9)) == pytest.approx(product)  # half the FLOPs, half the rate
    assert micro(work("masked", flops=1e9)) == pytest.approx(2 * product)


def test_what_goes_to_the_host_goes_over_the_cards_bus() -> None:
    made, reached = work("transfer", moved=1e6), replace(IDEAL, bus=1.0)
    assert micro(made, reached=reached) == pytest.approx(2000 * 1e6 / bus_bytes_per_s(A100.bus))
    assert bus_bytes_per_s("PCIe 3.0 x16") == pytest.approx(15.76e9)
    assert bus_bytes_per_s("PCIe 5.0 x8") == bus_bytes_per_s("SXM4") == pytest.approx(31.5e9, rel=1e-3)


def test_products_with_4_bit_weights_dequantise_them_first() -> None:
    works = (work("dequantise", "float16", moved=1e6),)
    plain = trace(*works, operators=("bitsandbytes.dequantize_4bit.default",))
    fused = trace(*works, operators=("bitsandbytes.dequantize_4bit.default", *2 * ("bitsandbytes.gemm_4bit.default",)))
    alone, three = (
        forecast_time(made, CONFIG, A100, efficiency=IDEAL).by_kind["dequantise"] for made in (plain, fused)
    )
    assert alone == pytest.approx(4 * 2000 * 1e6 / (A100.bandwidth_bytes_per_s * 0.5))
    assert three == pytest.approx(3 * alone)


def test_a_row_of_a_card_without_a_name_here_is_left_out() -> None:
    row = next(row for row in read_published(PUBLISHED) if row["gpu"] == "Tesla T4" and row["tokens_per_s"])
    timed, (out,) = speed_rank.timed_rows([{**row, "gpu": "Tesla T9"}])
    assert timed == []
    assert "Tesla T9" in out.reason


def test_a_trace_of_another_point_is_refused() -> None:
    made = trace(work("matmul", flops=1))
    made.point = (1, 512)
    with pytest.raises(NotAlike):
        forecast_time(made, CONFIG, A100)


def test_equal_values_share_a_rank() -> None:
    assert speed_rank.ranks([5, 1, 5, 9]) == [2.5, 1, 2.5, 4]


def test_spearman_is_of_order_alone() -> None:
    assert speed_rank.spearman([1, 2, 3, 4], [1, 10, 11, 500]) == pytest.approx(1)
    assert speed_rank.spearman([1, 2, 3, 4], [9, 7, 2, 1]) == pytest.approx(-1)
    assert speed_rank.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6·4 ÷ (5·24)
    assert speed_rank.spearman([1, 1, 1], [1, 2, 3]) is None


def speeds(predicted: list[float]) -> list[speed_rank.Speed]:
    return [
        speed_rank.Speed(card="c", model="m", label=str(i), published=i, predicted=value)
        for i, value in enumerate(predicted)
    ]


@pytest.mark.parametrize(
    ("predicted", "has_bar", "passed"),
    [
        ([1, 2, 3, 4, 5], True, True),
        ([5, 4, 3, 2, 1], True, False),
        ([1, 1, 1, 1, 1], True, False),
        ([4, 3, 2, 1], False, True),
    ],
)
def test_a_group_of_five_has_a_bar(predicted: list[float], has_bar: bool, passed: bool) -> None:
    (group,) = speed_rank.groups(speeds(predicted))
    assert (group.has_bar, group.passed) == (has_bar, passed)


def test_rows_of_one_config_are_one_and_others_are_left_out_with_a_reason() -> None:
    timed, left = speed_rank.timed_rows(read_published(PUBLISHED))
    assert len({(one.card, one.case.model, one.case.config) for one in timed}) == len(timed)
    assert max(len(one.tokens_per_s) for one in timed) == 2
    reasons = {out.reason for out in left}
    assert any("fused kernels" in reason for reason in reasons)
    assert "GPTQ base weights" in reasons
    assert not any("Mixtral" in one.case.model for one in timed)


@pytest.mark.slow  # about 30 s: fifteen dry runs
def test_predicted_speeds_order_the_published_ones(tmp_path: Path) -> None:
    """Traced anew, not read from a file: a change of the dry run or of the clock shows here."""
    timed, _ = speed_rank.timed_rows(read_published(PUBLISHED))
    store = TraceStore(tmp_path)
    found = [group for group in speed_rank.groups(speed_rank.predict(one, store) for one in timed) if group.has_bar]
    assert [(group.card, len(group.speeds)) for group in found] == [(A100.name, 6), (T4.name, 19)]
    assert all(group.passed for group in found), [(group.model, group.spearman) for group in found]
    for group in found:
        for speed in group.speeds:
            assert INTERVAL[0] <= speed.predicted / speed.published <= INTERVAL[1], speed


@pytest.mark.parametrize(("backwards", "code"), [(False, 0), (True, 1)])
def test_the_command_fails_when_a_group_is_under_the_bar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backwards: bool, code: int
) -> None:
    def predict(timed: speed_rank.Timed, store: object) -> speed_rank.Speed:
        told = timed.tokens_per_s[0]
        return speed_rank.Speed(
            card=timed.card,
            model=timed.case.model,
            label=timed.case.label,
            published=told,
            predicted=1 / told if backwards else told,
        )

    monkeypatch.setattr(speed_rank, "predict", predict)
    result = CliRunner().invoke(speed_rank.main, ["--traces", str(tmp_path)])
    assert result.exit_code == code
    assert ("FAILED" in result.output) is backwards
    assert "left out: " in result.output
