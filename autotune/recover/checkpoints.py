"""Which checkpoint a run can resume from, and what must be written into it so that its next attempt is heard."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from autotune.errors import StoreError
from autotune.recover.facts import Checkpoint
from autotune.recover.whole import broken, read_object

STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")
_MARK = "checkpoint-is-incomplete.txt"  # transformers' own, there while it saves on SIGTERM
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "adapter_model.bin", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FRAMED = (".safetensors", ".pt", ".pth", ".bin")
_READ_ON_RESUME = ("config.json", "adapter_config.json")
_RANK = re.compile(r"rng_state_(\d+)\.pth")


def newest_complete(
    output_dir: Path,
    *,
    since: float | None = None,
    leftovers: Mapping[str, int] | None = None,
    upto: int | None = None,
    max_steps: int | None = None,
    world_size: int | None = None,
) -> Checkpoint | None:
    """The complete checkpoint of the highest step; None: there is none.

    Those of another run are left out: written before `since` (a `time.time()`), unchanged since `leftovers` was taken
    (`present` at the run's beginning; a clock that jumps does not matter to it), above the step `upto`, or of a run of
    other than `max_steps`. `world_size` asks for the random state of every rank.
    """
    for step, path in _by_step(output_dir):
        if upto is not None and step > upto:
            continue
        written = _written_ns(path)
        if written is None or (since is not None and written < int(since * 1e9) - _RESOLUTION_NS):
            continue
        if leftovers is not None and leftovers.get(path.name) == written:
            continue
        if complete_reason(path, world_size=world_size) is not None:
            continue
        state = read_object(path / STATE) or {}
        if max_steps is not None and state.get("max_steps") not in (None, max_steps):
            continue
        return Checkpoint(path=path, step=step)
    return None


_RESOLUTION_NS = 2_000_000_000  # of a file's time, on the coarsest of file systems (FAT, some network mounts)


def present(output_dir: Path) -> dict[str, int]:
    """Name and time, in nanoseconds, of the checkpoints that are there now; 0 for one that has no state yet."""
    return {path.name: _written_ns(path) or 0 for _, path in _by_step(output_dir)}


def complete_reason(path: Path, *, world_size: int | None = None) -> str | None:
    """Why a run cannot resume exactly from this folder, in words; None where it can.

    Headers and ends of files are read, so it takes milliseconds whatever their size.
    """
    if not path.is_dir():
        return "it is no folder"
    try:
        names = {entry.name for entry in os.scandir(path)}
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if _MARK in names:
        return f"it is marked as incomplete ({_MARK})"
    return (
        _state_reason(path, names)
        or _weights_reason(path, names)
        or _optimizer_reason(path, names)
        or _random_reason(names, world_size)
        or next(_broken_files(path, names), None)
    )


def prepare_resume(checkpoint: Checkpoint, micro_batch_size: int) -> bool:
    """Let the next attempt run with another micro batch: transformers before 5.2 takes the checkpoint's. Whether it was
    another.

    Everything else in the state keeps its value, the file its mode and times; it is replaced whole or not at all.
    Raises `StoreError`.
    """
    path = checkpoint.path / STATE
    state = read_object(path)
    if state is None:
        raise StoreError(f"{path} cannot be read: resume from another checkpoint")
    if state.get("train_batch_size") == micro_batch_size:
        return False
    text = json.dumps({**state, "train_batch_size": micro_batch_size}, indent=2, sort_keys=True) + "\n"
    try:
        _replace(path, text.encode())
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error.strerror}), and without it the old micro batch may be used again:"
            " make room, or make it writable"
        ) from error
    return True


def set_aside_incomplete(output_dir: Path, leftovers: Mapping[str, int]) -> tuple[Path, ...]:
    """Rename the run's own incomplete checkpoints, so that neither a trainer that looks for its last one finds them nor
    the next save is mixed with them; what was there before the run (`leftovers`) stays. Gives their new names.

    Raises `StoreError`.
    """
    moved = []
    for _, path in _by_step(output_dir):
        is_own = leftovers.get(path.name) != (_written_ns(path) or 0)
        if not is_own or complete_reason(path) is None or _is_only_weights(path):
            continue
        new = path.with_name(f"incomplete-{path.name}-{secrets.token_hex(2)}")
        try:
            path.rename(new)
        except OSError as error:
            raise StoreError(f"{path} cannot be renamed ({error.strerror}): move it away, it is incomplete") from error
        moved.append(new)
    return tuple(moved)


def _by_step(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """The folders named checkpoint-<step>, the highest step first."""
    try:
        found = [(match, entry) for entry in output_dir.iterdir() if (match := _NAME.fullmatch(entry.name))]
    except OSError:
        return
    yield from sorted(((int(match[1]), entry) for match, entry in found), reverse=True)


def _written_ns(path: Path) -> int | None:
    """When its trainer's state, which is written last, was."""
    try:
        return (path / STATE).stat().st_mtime_ns
    except OSError:
        return None


def _state_reason(path: Path, names: set[str]) -> str | None:
    if STATE not in names:
        return f"{STATE}, which is written last, is missing"
    state = read_object(path / STATE)
    if state is None:
        return f"{STATE} is cut off"
    step, match = state.get("global_step"), _NAME.fullmatch(path.name)
    if not isinstance(step, int):
        return f"{STATE} names no step"
    if match and int(match[1]) != step:
        return f"{STATE} is of step {step}"
    return None


def _weights_reason(path: Path, names: set[str]) -> str | None:
    if names & {"adapter_model.safetensors", "adapter_model.bin"} and "adapter_config.json" not in names:
        return "adapter_config.json is missing"
    for index in _INDEXES:
        if index in names:
            return _shards_reason(path, index, names)
    if names & set(_WEIGHTS) or _is_sharded(path, names):
        return None
    adapters = [name for name in names if (path / name).is_dir() and any((path / name / w).is_file() for w in _WEIGHTS)]
    reasons = (broken(path / name / w) for name in adapters for w in _WEIGHTS if (path / name / w).is_file())
    return next((reason for reason in reasons if reason), None) if adapters else "it holds no weights"


def _shards_reason(path: Path, index: str, names: set[str]) -> str | None:
    found = (read_object(path / index) or {}).get("weight_map")
    if not isinstance(found, dict) or not found:
        return f"{index} cannot be read"
    missing = sorted(set(map(str, found.values())) - names)
    return f"{missing[0]} is missing" if missing else None


def _optimizer_reason(path: Path, names: set[str]) -> str | None:
    if _is_deepspeed(path, names):
        return None  # it writes its own, and may have no scheduler of torch's
    folders = any("optimizer" in name and (path / name).is_dir() for name in names)
    if not (names & {"optimizer.pt", "optimizer.bin"} or folders):
        return "it holds no optimizer state (save_only_model), so training cannot go on exactly from it"
    return None if "scheduler.pt" in names else "scheduler.pt is missing"


def _random_reason(names: set[str], world_size: int | None) -> str | None:
    ranks = {int(match[1]) for name in names if (match := _RANK.fullmatch(name))}
    if "rng_state.pth" in names and (world_size or 1) == 1:
        return None
    if not ranks:
        return "rng_state.pth is missing"
    missing = set(range(max(world_size or 0, max(ranks) + 1))) - ranks
    return f"rng_state_{min(missing)}.pth is missing" if missing else None


def _broken_files(path: Path, names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        if name in _READ_ON_RESUME and read_object(path / name) is None:
            yield f"{name} is cut off"
        if Path(name).suffix in _FRAMED and (path / name).is_file() and (reason := broken(path / name)):
            yield reason
    if _is_deepspeed(path, names):
        files = [file for name in names if name.startswith("global_step") for file in (path / name).iterdir()]
        yield from (reason for file in files if (reason := broken(file)))


def _is_sharded(path: Path, names: set[str]) -> bool:
    """Weights in folders or files of ZeRO or FSDP; torch's sharded writer makes `.metadata` last."""
    folders = [name for name in names if name.startswith("pytorch_model_fsdp") and (path / name).is_dir()]
    is_fsdp = "pytorch_model_fsdp.bin" in names or any((path / name / ".metadata").is_file() for name in folders)
    return is_fsdp or _is_deepspeed(path, names)


def _is_deepspeed(path: Path, names: set[str]) -> bool:
    """Whether `latest`, which is written last, names a folder that is there."""
    if "latest" not in names:
        return False
    try:
        tag = (path / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False
    return bool(tag) and tag in names and any((path / tag).iterdir())


def _is_only_weights(path: Path) -> bool:
    """A save that was never meant to be resumed from (save_only_model) is not incomplete."""
    names = {entry.name for entry in path.iterdir()}
    return (
        _MARK not in names
        and not any(name.startswith(("optimizer", "rng_state")) for name in names)
        and (_state_reason(path, names) is None and _weights_reason(path, names) is None)
    )


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all, with the mode and times that it and its folder had. Raises OSError."""
    facts, folder = path.stat(), path.parent.stat()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, facts.st_mode & 0o777)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, facts.st_mode & 0o7777)  # past the umask
        os.utime(temporary, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))  # by it transformers tells old from new


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
