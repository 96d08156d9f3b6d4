"""The field's common guide for QLoRA of Llama-3-8B on small cards, claim by claim beside what is predicted.

`python -m benchmarks.guide_claims > benchmarks/results/guide_claims-DATE.md`

Predicted with no GPU, and nothing is fitted. Every verdict is reckoned from the predictions with the claim's own
bounds: "about" is within 20 %, a range ends where it ends. Where a claim leaves the recipe open it is asked of three,
and a claim that is true of some of them holds in part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from autotune.cli.estimate_question import with_headroom
from autotune.hardware.cards import cards, find_card
from autotune.predict.forecast import Forecast, forecast, target_of_card
from autotune.predict.store import TraceStore, library_versions
from autotune.probe.dry_run import DryRunner
from autotune.values import Attention, LossPath, Quantization, TrainingConfig, Upcast
from autotune.workload.models import resolve_model
from benchmarks.records import markdown_table, one_line_errors

MODEL = "meta-llama/Meta-Llama-3-8B"
ABOUT = 0.2  # how far "about" reaches, either way
EFFECTIVE_BATCH = 8  # the guide's micro batch 1-2 with accumulation 4-8
MICRO_BATCHES = (1, 2, 4, 8)
#: What people run: peft's k-bit preparation makes float32 copies, and the loss takes the logits whole.
DOCUMENTED = TrainingConfig(
    sequence_length=2048,
    micro_batch_size=2,
    gradient_accumulation_steps=EFFECTIVE_BATCH // 2,
    gradient_checkpointing="full",
    upcast=Upcast.FP32,
)
NO_COPIES = replace(DOCUMENTED, upcast=Upcast.NONE)
LEAN = replace(NO_COPIES, loss=LossPath.CHUNKED)
RECIPES = {"as documented": DOCUMENTED, "no float32 copies": NO_COPIES, "chunked loss too": LEAN}
#: Sold size in GB → a card of it, the smallest first.
SIZES = {8: "RTX 4060", 10: "RTX 3080 10GB", 12: "RTX 3060", 16: "RTX 5070 Ti", 24: "RTX 4090", 80: "A100 80GB"}
ROOMY = SIZES[80]  # everything here fits: settings are compared on it
#: What outlives a step; the rest of the peak is activations and other temporaries.
LASTING = frozenset(
    ("base weights", "quantisation state", "adapters", "gradients", "optimizer state", "library workspaces")
)
NEWEST = ("blackwell", "rdna4", "xe2-hpg")  # of each vendor's cards for desktops

Predict = Callable[[TrainingConfig, str], Forecast]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of the guide, what is predicted of it, and the verdict."""

    words: str
    predicted: str
    verdict: str  # holds | holds in part | corrected | not judged
    measured: str = "no card"


@dataclass(frozen=True, slots=True)
class Found:
    """One prediction that a claim is judged by, and whether the claim is true of it."""

    text: str
    holds: bool


def judged(words: str, found: Iterable[Found]) -> Claim:
    """The claim with its findings, each marked, and the verdict that follows from them."""
    found = list(found)
    share = sum(one.holds for one in found) / len(found)
    verdict = "holds" if share == 1 else "holds in part" if share else "corrected"
    return Claim(
        words=words, predicted="; ".join(f"{one.text} {'✓' if one.holds else '✗'}" for one in found), verdict=verdict
    )


def is_about(value: float, told: float) -> bool:
    return told * (1 - ABOUT) <= value <= told * (1 + ABOUT)


def batched(config: TrainingConfig, micro_batch_size: int) -> TrainingConfig:
    """With this micro batch, and the same effective batch."""
    return replace(
        config,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=EFFECTIVE_BATCH // micro_batch_size,
    )


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def speed(found: Forecast) -> float:
    return found.tokens_per_second or 0.0


# Claims


def base_weights(predict: Predict) -> Claim:
    sizes = {}
    for name in ("as documented", "no float32 copies"):
        parts = predict(RECIPES[name], ROOMY).memory.parts
        sizes[name] = parts["base weights"] + parts.get("quantisation state", 0)
    return judged(
        "the 4-bit base takes about 5.5 GB",
        (Found(f"{gb(size)} {name}", is_about(size, 5.5e9)) for name, size in sizes.items()),
    )


def adapters(predict: Predict) -> Claim:
    size = predict(DOCUMENTED, ROOMY).memory.parts["adapters"]
    found = Found(f"{size / 1e6:.0f} MB in float32, on all linear layers", is_about(size, 200e6))
    return judged("rank-16 adapters take about 200 MB", [found])


def states(predict: Predict) -> Claim:
    parts = predict(DOCUMENTED, ROOMY).memory.parts
    gradients, optimizer = parts.get("gradients", 0), parts.get("optimizer state", 0)
    found = Found(f"{gb(gradients)} and {gb(optimizer)}, in float32", 2e9 <= gradients + optimizer <= 4e9)
    return judged("gradients and AdamW states take 2–4 GB", [found])


def activations(predict: Predict) -> Claim:
    found = []
    for name, config in RECIPES.items():
        for batch in (1, 2):
            parts = predict(batched(config, batch), ROOMY).memory.parts
            size = sum(held for part, held in parts.items() if part not in LASTING)
            found.append(Found(f"{gb(size)} {name}, micro batch {batch}", 3e9 <= size <= 6e9))
    return judged("activations take 3–6 GB", found)


def minimum(predict: Predict) -> Claim:
    found = []
    for name, config in RECIPES.items():
        enough = next((size for size, card in SIZES.items() if predict(batched(config, 1), card).fits), None)
        found.append(Found(f"{f'{enough} GB' if enough else 'more'} {name}, micro batch 1", enough == 12))
    return judged("12 GB (RTX 3060) is the minimum", found)


def comfortable(predict: Predict) -> Claim:
    found = []
    for name, config in RECIPES.items():
        for card in (SIZES[16], "RX 9070"):
            one = predict(config, card)
            high, room = one.intervals["device_used_bytes"][1], one.capacity_bytes or 0
            found.append(Found(f"{card} {name}: at most {gb(high)} of {gb(room)}", bool(one.fits) and high <= room))
    return judged("16 GB (RTX 5070 Ti, RX 9070) are comfortable: micro batch 2 at the interval's high end", found)


def shorter(predict: Predict) -> Claim:
    """Out of memory as documented: what each single change saves. The quickest fix is the one that saves most."""
    before = predict(DOCUMENTED, ROOMY).device_used_bytes
    changes = {
        "half the sequence": replace(DOCUMENTED, sequence_length=DOCUMENTED.sequence_length // 2),
        "half the micro batch": batched(DOCUMENTED, 1),
        "no float32 copies": NO_COPIES,
        "chunked loss": replace(DOCUMENTED, loss=LossPath.CHUNKED),
        "checkpoints on the host": replace(DOCUMENTED, gradient_checkpointing="offload"),
        "8-bit AdamW": replace(DOCUMENTED, optimizer="adamw_8bit"),
    }
    saved = {name: before - predict(config, ROOMY).device_used_bytes for name, config in changes.items()}
    most = max(saved.values())
    texts = [f"{name} {gb(size)}" for name, size in sorted(saved.items(), key=lambda item: -item[1])]
    found = Found(f"of {gb(before)} each saves: {', '.join(texts)}", saved["half the sequence"] >= most)
    return judged("halving the sequence length is the quickest fix: no other single change saves more", [found])


def micro_batch(predict: Predict) -> Claim:
    found = []
    for name, config in RECIPES.items():
        for size in (12, 16):
            tried = [predict(batched(config, batch), SIZES[size]) for batch in MICRO_BATCHES]
            fitting = [one for one in tried if one.fits]
            if not fitting:
                found.append(Found(f"{size} GB {name}: none fits", False))
                continue
            best = max(fitting, key=speed)
            shape = f"{best.config.micro_batch_size} × {best.config.gradient_accumulation_steps}"
            within = best.config.micro_batch_size <= 2 and 4 <= best.config.gradient_accumulation_steps <= 8
            found.append(Found(f"{size} GB {name}: {shape}, {speed(best):,.0f} tokens/s", within))
    return judged("micro batch 1–2 with accumulation 4–8: the fastest that fits", found)


def checkpointing(predict: Predict) -> Claim:
    found = []
    for name, config in (("as documented", DOCUMENTED), ("chunked loss too", LEAN)):
        for batch in (1, 2):
            on = predict(batched(config, batch), ROOMY)
            off = predict(replace(batched(config, batch), gradient_checkpointing="off"), ROOMY)
            saved, slower = off.device_used_bytes - on.device_used_bytes, 1 - speed(on) / speed(off)
            within = 2e9 <= saved <= 4e9 and 0.1 <= slower <= 0.2
            found.append(Found(f"{gb(saved)} for {100 * slower:.0f} % {name}, micro batch {batch}", within))
    return judged("checkpointing saves 2–4 GB for 10–20 % of speed", found)


def wrong_setting(predict: Predict) -> Claim:
    """From the config of about 9 GB, each single setting done wrong; the claim is of the worst."""
    before = predict(LEAN, ROOMY).device_used_bytes
    changes = {
        "checkpointing off": replace(LEAN, gradient_checkpointing="off"),
        "eager attention": replace(LEAN, attention=Attention.EAGER),
        "full logits": NO_COPIES,
        "float32 copies": replace(LEAN, upcast=Upcast.FP32),
        "16-bit base": replace(LEAN, quantization=Quantization.NONE),
        "micro batch 8": batched(LEAN, 8),
    }
    after = {name: predict(config, ROOMY).device_used_bytes for name, config in changes.items()}
    texts = [f"{name} {gb(size)}" for name, size in sorted(after.items(), key=lambda item: -item[1])]
    found = Found(
        f"{gb(before)} becomes: {', '.join(texts)}",
        is_about(before, 9e9) and max(after.values()) >= 20e9 * (1 - ABOUT),
    )
    return judged("one wrong setting takes 9 GB to 20 GB", [found])


def unsloth(predict: Predict) -> Claim:
    why = "its kernels were neither run nor traced, so nothing is predicted of them"
    return Claim(words="Unsloth is about twice as fast", predicted=why, verdict="not judged")


def flash_attention(predict: Predict) -> Claim:
    found = []
    for architecture in NEWEST:
        runs = [card.attention.flash_attention_2 for card in cards() if card.architecture == architecture]
        found.append(Found(f"{architecture}: {sum(runs)} of {len(runs)} cards", all(runs)))
    return judged("FlashAttention 2 runs on the newest cards: by the catalogue, from the packages' own words", found)


CLAIMS = (
    *(base_weights, adapters, states, activations, minimum, comfortable, shorter, micro_batch, checkpointing),
    *(wrong_setting, unsloth, flash_attention),
)


def table(rows: Iterable[Claim]) -> str:
    """As Markdown."""
    head = ("the guide says", "predicted here", "measured", "verdict")
    return markdown_table(head, [(row.words, row.predicted, row.measured, row.verdict) for row in rows])


_PAGE = f"""# The common guide for QLoRA on small cards, beside what is predicted

Written by `python -m benchmarks.guide_claims` with
{{versions}}.

**Predicted, nothing was run**: {MODEL}'s shape, NF4 with double quantisation, rank 16 on all linear
layers, SDPA attention, full checkpointing, {DOCUMENTED.optimizer}, {DOCUMENTED.sequence_length:,} tokens,
micro batch 2 with accumulation 4 or 1 with 8, unless a row says otherwise. *As documented* is peft's k-bit preparation
with its float32 copies, and the whole logits; *no float32 copies* leaves the copies out; *chunked loss too* also takes
the logits in pieces. GB are 10⁹ bytes; of a device what it shows in use: tensors, the allocator's cache, the CUDA
context. A config fits where 2 % of the card, at least 256 MiB, stay free. Savings and settings are compared on an A100
80 GB, where all of them fit.
✓ and ✗: what the claim is true of and what not; "about" is within {100 * ABOUT:.0f} %, a range ends where it ends.

{{table}}
"""


@click.command(help=__doc__)
@click.option("--traces", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps traces for later.")
def main(traces: Path | None) -> None:
    source = resolve_model(MODEL)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        runner = DryRunner(TraceStore(traces or Path(folder)))

        def predict(config: TrainingConfig, card: str) -> Forecast:
            target = with_headroom(target_of_card(find_card(card).card))
            return forecast(runner.trace(source, config, target.kernels), config, target)

        rows = []
        try:
            for number, claim in enumerate(CLAIMS, 1):
                rows.append(claim(predict))
                click.echo(f"{number}/{len(CLAIMS)} {rows[-1].words}: {rows[-1].verdict}", err=True)
        finally:
            runner.close()
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "trl")
    click.echo(_PAGE.format(versions=versions, table=table(rows)), nl=False)


if __name__ == "__main__":
    main()
