"""Traces on disk: one file for a model, settings, kernels and library versions; found without importing torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from pathlib import Path

from autotune.hardware.ask_versions import installed_versions
from autotune.predict.kernels import KernelSet
from autotune.predict.trace import FORMAT, Trace, from_document, to_document
from autotune.values import LIBRARIES, LossPath, ModelSource, Trainer, TrainingConfig, to_json

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
#: Modules of this folder that read traces; every other one, and the workload, decides what is in a trace.
_READERS = frozenset(
    {"allocator.py", "context.py", "forecast.py", "kernels.py", "learned.py", "memory.py", "plot.py", "steptime.py"}
)
_STRAY = re.compile(r".+\.part|tmp\w{8}")  # what a killed process leaves; the second is tempfile's naming
_TRACE = re.compile(r"[0-9a-f]{24}\.json\.gz")
_STRAY_KEPT_S = 24 * 3600.0
_TRACE_KEPT_S = 90 * 24 * 3600.0  # since it was read


def window_of(source: ModelSource) -> int | None:
    """Tokens of the model's sliding window, which changes the masks of longer sequences."""
    text = source.config.get("text_config")
    for holder in (source.config, text if isinstance(text, dict) else {}):
        window = holder.get("sliding_window")
        if isinstance(window, int) and window > 0 and holder.get("use_sliding_window") is not False:
            return window
    return None


#: Tokens of one tile of trl's loss (trl 1.16, kernels/chunked_logprob.py TOKEN_CHUNK_SIZE).
TRL_TILE = 4096


def in_one_tile(config: TrainingConfig) -> bool:
    """Whether trl's loss takes all tokens of a micro batch at once: its buffer is then as long as they are."""
    tiled = config.trainer is Trainer.TRL and config.loss is LossPath.CHUNKED
    return tiled and config.micro_batch_size * config.sequence_length <= TRL_TILE


def class_of(source: ModelSource, config: TrainingConfig) -> str:
    """Configs of one class share a trace: a batch of one skips copies, a longer sequence than the window has masks,
    whose rows may be padded."""
    window, tokens = window_of(source), config.sequence_length
    masks = ("-padded" if tokens % 16 else "") + "-windowed" if window and tokens >= window else ""
    tile = "-tile" if in_one_tile(config) else ""
    return f"{'one' if config.micro_batch_size == 1 else 'many'}{masks}{tile}"


#: What reading a damaged file, or one of another shape, can raise.
_UNREADABLE = (
    *(OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError),
    *(ZeroDivisionError, RecursionError),
)


class TraceStore:
    """Traces in a folder, which is made when the first is kept. A file that cannot be read is made again."""

    def __init__(self, folder: Path, versions: dict[str, str | None] | None = None) -> None:
        self.folder = folder
        self._loaded: dict[Path, Trace] = {}
        self._versions = library_versions() if versions is None else versions

    def find(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> Trace | None:
        """The trace that holds at the config's B and T, or None."""
        for own_point in (False, True):
            found = self._read(self.path(source, config, kernels, own_point))
            try:
                if found is not None:
                    found.expand("first", config.micro_batch_size, config.sequence_length)
                    return found
            except _UNREADABLE:
                continue
        return None

    def has_class(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet) -> bool:
        """Whether there is a trace of the config's class, though it may not hold at its B and T."""
        return self._read(self.path(source, config, kernels, own_point=False)) is not None

    def _read(self, path: Path) -> Trace | None:
        if path not in self._loaded:
            try:
                self._loaded[path] = from_document(json.loads(gzip.decompress(path.read_bytes())))
            except _UNREADABLE:
                return None
            with contextlib.suppress(OSError):  # a folder that is read only
                os.utime(path)
        return self._loaded[path]

    def keep(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, trace: Trace) -> None:
        """Written whole or not at all; a folder that cannot be written to costs the next command its time."""
        path = self.path(source, config, kernels, trace.point is not None)
        self._loaded[path] = trace
        data = gzip.compress(json.dumps(to_document(trace), separators=(",", ":")).encode(), compresslevel=1)
        with contextlib.suppress(OSError):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # autotune's own folder, private
            self.folder.mkdir(exist_ok=True)
            remove_old(self.folder, time.time())
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                part.write_bytes(data)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def path(self, source: ModelSource, config: TrainingConfig, kernels: KernelSet, own_point: bool) -> Path:
        """Where the trace of the config's class is kept, or the one that holds for its own B and T alone."""
        settings = {key: value for key, value in to_json(config).items() if key not in _FREE}
        settings["padding_free"] = config.is_padding_free
        point = (config.micro_batch_size, config.sequence_length) if own_point else None
        where = class_of(source, config)
        picked = {k: v for k, v in dataclasses.asdict(kernels).items() if k != "cublas_workspace_bytes"}
        key = [source.fingerprint, settings, picked, where, point, self._versions, FORMAT, sources_hash()]
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json.gz"


def library_versions() -> dict[str, str | None]:
    """Versions that decide what a step allocates, of this interpreter; None: not installed."""
    return installed_versions(list(LIBRARIES))


@functools.cache
def sources_hash(package: Path = Path(__file__).parent.parent) -> str:
    """Of the files that decide what is in a trace: one that another state of them made is another trace."""
    makers = [path for path in (package / "predict").glob("*.py") if path.name not in _READERS]
    makers += (package / "workload").glob("*.py")
    found = hashlib.sha256()
    for path in sorted(makers):
        found.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def remove_old(folder: Path, now: float) -> None:
    """Delete what killed processes left a day ago, and traces that nobody read for 90 days."""
    for names, kept_s in ((_STRAY, _STRAY_KEPT_S), (_TRACE, _TRACE_KEPT_S)):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # another process deletes too
                if names.fullmatch(path.name) and now - path.stat().st_mtime > kept_s:
                    path.unlink()
