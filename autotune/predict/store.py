"""Traces on disk: one file for a model, settings, kernels and library versions; found without importing torch."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

from autotune.predict.kernels import KernelSet
from autotune.predict.trace import FORMAT, Trace, from_document, to_document
from autotune.values import ModelSource, TrainingConfig, to_json

#: Settings that a trace does not depend on, or that are its variables.
_FREE = (
    "micro_batch_size",
    "sequence_length",
    "gradient_accumulation_steps",
    "world_size",
    "eval_micro_batch_size",
    "allocator",
    "packing",
    "lora_alpha",
)
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


def window_of(source: ModelSource) -> int | None:
    """Tokens of the model's sliding window, which changes the masks of longer sequences."""
    text = source.config.get("text_config")
    for holder in (source.config, text if isinstance(text, dict) else {}):
        window = holder.get("sliding_window")
        if isinstance(window, int) and window > 0 and holder.get("use_sliding_window") is not False:
            return window
    return None


def class_of(source: ModelSource, batch: int, tokens: int) -> str:
    """Points of one class share a trace: a batch of one skips copies, a longer sequence than the window has masks."""
    window = window_of(source)
    return f"{'one' if batch == 1 else 'many'}{'-windowed' if window and tokens >= window else ''}"


class TraceStore:
    """Traces in a folder, which is made when the first is kept. A file that cannot be read is made again."""

    def __init__(self, folder: Path, versions: dict[str, str | None] | None = None) -> None:
        self.folder = folder
        self._loaded: dict[Path, Trace] = {}
        self._versions = library_versions() if versions is None else versions

    def find(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace | None:
        """The trace that holds at the config's B and T, or None."""
        for own_point in (False, True):
            path = self.path(source, config, kernels, own_point)
            try:
                if path not in self._loaded:
                    self._loaded[path] = from_document(json.loads(gzip.decompress(path.read_bytes())))
                self._loaded[path].expand("first", config.micro_batch_size, config.sequence_length)
            except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError):
                continue
            return self._loaded[path]
        return None

    def keep(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, trace: Trace) -> None:
        """Written whole or not at all; a folder that cannot be written to costs the next command its time."""
        path = self.path(source, config, kernels, trace.point is not None)
        self._loaded[path] = trace
        data = gzip.compress(json.dumps(to_document(trace), separators=(",", ":")).encode(), compresslevel=1)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(data)
            os.replace(file.name, path)

    def path(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, own_point: bool) -> Path:
        """Where the trace of the config's class is kept, or the one that holds for its own B and T alone."""
        settings = {key: value for key, value in to_json(config).items() if key not in _FREE}
        settings["padding_free"] = config.is_padding_free
        point = (config.micro_batch_size, config.sequence_length) if own_point else None
        where = class_of(source, config.micro_batch_size, config.sequence_length)
        picked = {k: v for k, v in dataclasses.asdict(kernels).items() if k != "cublas_workspace_bytes"}
        key = [source.fingerprint, settings, picked, where, point, self._versions, FORMAT]
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json.gz"


def library_versions() -> dict[str, str | None]:
    """Versions that decide what a step allocates; None: not installed."""
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
