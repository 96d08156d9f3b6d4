"""The field's common guide for QLoRA on small cards, set beside what is predicted: `python -m benchmarks.guide_claims`.

Predicted with no GPU; where a card was there its measurements stand in `benchmarks/results/`. Nothing is fitted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autotune.hardware.cards import find_card
from autotune.predict.forecast import Forecast, forecast, target_of_card
from autotune.predict.store import TraceStore
from autotune.probe.dry_run import DryRunner
from autotune.values import GIB, LossPath, TrainingConfig, Upcast
from autotune.workload.models import resolve_model
from gpu_db.store import default_home

MODEL = "meta-llama/Meta-Llama-3-8B"
START = TrainingConfig(
    sequence_length=2048,
    micro_batch_size=2,
    gradient_accumulation_steps=8,
    gradient_checkpointing="full",
    upcast=Upcast.FP32,
)
Predict = Callable[[TrainingConfig, str], Forecast]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of the guide, and what is predicted of it."""

    words: str
    predicted: str
    verdict: str


def claims(predict: Predict) -> list[Claim]:
    """Every claim that a prediction can judge, with a verdict each."""
    usual = predict(START, "3060")
    parts = usual.memory.parts
    lean = replace(START, upcast=Upcast.NONE, loss=LossPath.CHUNKED, micro_batch_size=1, gradient_accumulation_steps=16)
    on_12, on_16, on_9070 = (predict(lean, name) for name in ("3060", "5070 Ti", "RX 9070"))
    full_12 = predict(replace(START, micro_batch_size=1, gradient_accumulation_steps=16), "3060")
    short = predict(replace(START, sequence_length=1024), "3060")
    off = predict(replace(START, gradient_checkpointing="off"), "4090")
    on = predict(START, "4090")
    states = parts.get("gradients", 0) + parts.get("optimizer state", 0)
    states = max(states, 3 * parts.get("adapters", 0))
    activations = sum(
        parts.get(name, 0) for name in ("layer activations", "checkpointed activations", "attention", "logits and loss")
    )
    fixed = predict(replace(START, upcast=Upcast.NONE, loss=LossPath.CHUNKED), "3060")
    small, large = (
        predict(lean, "4090"),
        predict(replace(lean, gradient_checkpointing="off", micro_batch_size=2), "4090"),
    )
    weights = on_12.memory.after_load_bytes
    return [
        _claim("4-bit base of Llama-3-8B takes about 5.5 GB", f"{_gb(weights)} as loaded, 16-bit head; "
               f"{_gb(usual.memory.after_load_bytes)} with peft's float32 copies", 5.0e9 < weights < 6.1e9),
        _claim("rank-16 adapters take about 200 MB", f"{parts.get('adapters', 0) / 1e6:.0f} MB (float32, all linear)",
               1.5e8 < parts.get("adapters", 0) < 2.5e8),
        _claim("gradients and AdamW states take 2-4 GB", f"{_gb(states)}", 2e9 < states < 4e9),
        _claim("activations take 3-6 GB", f"{_gb(activations)} at 2 × 2,048 tokens, most of it logits",
               3e9 < activations < 6e9),
        _claim("12 GB (RTX 3060) are the minimum", f"1 × 2,048 tokens: {_gib(on_12)} with chunked loss and no float32 "
               f"copies, {_gib(full_12)} with the documented recipe", bool(on_12.fits) and not full_12.fits),
        _claim("16 GB (RTX 5070 Ti, RX 9070) are comfortable", f"the same config: {_gib(on_16)}, {_gib(on_9070)}",
               bool(on_16.fits) and bool(on_9070.fits)),
        _claim("halving the sequence length is the quickest fix", f"{_gib(usual)} → {_gib(short)}; chunked loss and no "
               f"float32 copies at full length: {_gib(fixed)}",
               False),
        _claim("checkpointing saves 2-4 GB for 10-20 % of speed", f"{_gib(off)} → {_gib(on)}, "
               f"{1 - (on.tokens_per_second or 0) / (off.tokens_per_second or 1):.0%} slower",
               2e9 < off.device_used_bytes - on.device_used_bytes < 4.5e9),
        _claim("one wrong setting takes 9 GB to 20 GB", f"{_gib(small)} → {_gib(large)} (checkpointing off, 2 samples)",
               large.device_used_bytes > 1.6 * small.device_used_bytes),
    ]  # fmt: skip


def _claim(words: str, predicted: str, holds: bool) -> Claim:
    return Claim(words=words, predicted=predicted, verdict="holds" if holds else "corrected")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _gib(found: Forecast) -> str:
    return f"{found.device_used_bytes / GIB:.1f} GiB"


def table(rows: list[Claim]) -> str:
    """As Markdown."""
    head = "| the guide says | predicted here | verdict |\n| --- | --- | --- |\n"
    return head + "".join(f"| {row.words} | {row.predicted} | {row.verdict} |\n" for row in rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=default_home() / "traces", help="where traces are kept")
    runner = DryRunner(TraceStore(parser.parse_args().traces))
    source = resolve_model(MODEL)

    def predict(config: TrainingConfig, card: str) -> Forecast:
        target = target_of_card(find_card(card).card)
        return forecast(runner.trace(source, config, target.kernels), config, target)

    try:
        print(table(claims(predict)))
    finally:
        runner.close()
    print(f"\nPredicted, not measured: {MODEL}'s shape, NF4 with double quantisation, rank 16 on all linear layers,")
    print(f"{START.optimizer}. Unsloth's speed and FlashAttention 2 on the newest cards are not judged here.")
    print("CUDA contexts are those of `python -m benchmarks.contexts`.")


if __name__ == "__main__":
    main()
