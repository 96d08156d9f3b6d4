"""Samples of letters, each of another length, and few long ones that the shuffled order brings late."""

from __future__ import annotations

import json
import random
from pathlib import Path

SAMPLES = 96  # twelve optimizer steps of eight
SHORTEST = 8  # tokens


def lengths(long: dict[int, int]) -> list[int]:
    """Tokens of each sample: all different, so that the tokens of a step say which samples were in it."""
    short = list(range(SHORTEST, SHORTEST + SAMPLES))
    random.Random(0).shuffle(short)
    return [long.get(row, tokens) for row, tokens in enumerate(short)]


def make_data(folder: Path, long: dict[int, int]) -> Path:
    """`train.jsonl` in `folder`, with an id and a text a line; `long` gives some rows another length in tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = random.Random(1)
    lines = []
    for row, tokens in enumerate(lengths(long)):
        text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz     ", k=tokens))
        lines.append(json.dumps({"id": row, "text": text}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
