"""What the text of a training script tells of its arguments. It is only read, never run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MAX_BYTES = 1 << 20
_OWN_PARSER = re.compile(r"add_argument\(|ArgumentParser\(|@click\.|import (fire|typer|tyro|hydra)|docopt")
_TRL_CONFIG = re.compile(r"\b(SFT|DPO|KTO|Reward|GRPO|RLOO)Config\b")
_BARE = re.compile(r"""["']--gradient[-_]checkpointing["'][^)]*store_true""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """All False: there is no text, or it tells nothing."""

    reads_plan: bool = False  # it takes its settings from AUTOTUNE_PLAN
    hugging_face: bool = False  # it parses TrainingArguments or one of trl's configs from its command line
    trl: bool = False
    own_parser: bool = False
    bare_checkpointing: bool = False  # its checkpointing flag takes no value
    text: str = ""

    def names(self, keys: Iterable[str]) -> bool:
        """Whether its own parser has one of these options."""
        return any(f"--{name}" in self.text for key in keys for name in (key, key.replace("_", "-")))

    def ignores(self, argument: str) -> bool:
        """Whether it trains itself, and makes no use of an argument that its parser takes."""
        return ".train(" in self.text and argument not in self.text


def read_script(path: Path | None) -> Script:
    """Never raises: a script that cannot be read tells nothing."""
    try:
        with open(path or "", "rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return Script()
    trl = bool(_TRL_CONFIG.search(text))
    parser = "HfArgumentParser" in text or "TrlParser" in text
    hugging_face = parser and (trl or "TrainingArguments" in text)
    return Script(
        reads_plan="AUTOTUNE_PLAN" in text
        or bool(re.search(r"\bautotune\.recover\b|from autotune import recover", text)),
        hugging_face=hugging_face,
        trl=trl,
        own_parser=not hugging_face and bool(_OWN_PARSER.search(text)),
        bare_checkpointing=not hugging_face and bool(_BARE.search(text)),
        text=text,
    )
