"""Checkpoints laid out as transformers' Trainer with LoRA writes them: the stand-in's, without torch."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"checkpoint-(\d+)")
_ZIPPED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@dataclass(frozen=True)
class Saved:
    """What the stand-in resumes from."""

    step: int
    state: str
    train_batch_size: int


def write_checkpoint(
    folder: Path, step: int, state: str, *, trainer_state: dict[str, Any], between: Callable[[Path], None]
) -> None:
    """File after file, `trainer_state.json` last; `between` is called when the model is written. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(_safetensors(state))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}', encoding="utf-8")
    between(folder)
    for name in _ZIPPED:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(f"{Path(name).stem}/data.pkl", f"{name} {step} {state}")
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state, indent=2), encoding="utf-8")


def read_checkpoint(folder: Path) -> Saved:
    """As strict as torch and safetensors. Raises OSError, ValueError, KeyError, BadZipFile."""
    state = _tensor((folder / "adapter_model.safetensors").read_bytes())
    trainer = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    for name in _ZIPPED:
        with zipfile.ZipFile(folder / name) as archive:
            said = archive.read(f"{Path(name).stem}/data.pkl").decode()
        if said != f"{name} {trainer['global_step']} {state}":
            raise ValueError(f"{folder / name} is not of the same moment as the model")
    return Saved(trainer["global_step"], state, trainer["train_batch_size"])


def last_checkpoint(output_dir: Path) -> Path | None:
    """The one with the highest step, whole or not: what `--resume_from_checkpoint True` takes."""
    found = {int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`."""
    if limit is None:
        return
    steps = sorted(int(match[1]) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name)))
    for step in steps[:-limit]:
        shutil.rmtree(output_dir / f"checkpoint-{step}")


def _safetensors(state: str) -> bytes:
    data = bytes.fromhex(state)
    header = json.dumps({"lora.weight": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def _tensor(content: bytes) -> str:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    begin, end = header["lora.weight"]["data_offsets"]
    data = content[8 + size :]
    if len(data) != end:
        raise ValueError("Error while deserializing header: incomplete metadata, file not fully covered")
    return data[begin:end].hex()
