"""A run's own folder: made private, held by one supervisor at a time, found again after an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from autotune.errors import AutotuneError, InvalidRequest, StoreError
from autotune.recover.plan import RunState, read_state
from autotune.recover.processes import end_leftovers
from gpu_db.store import default_home

_LOCK = "supervisor.lock"


def runs_folder() -> Path:
    return default_home() / "runs"


def new_folder(given: Path | None) -> tuple[str, Path]:
    """A run's id and its folder, made for its owner alone. Raises `InvalidRequest`, `StoreError`."""
    run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    folder = given.absolute() if given else runs_folder() / run_id
    try:
        if given is None:
            default_home().mkdir(mode=0o700, parents=True, exist_ok=True)  # a mode counts for the last folder alone
            folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if given and any(folder.iterdir()):
            raise InvalidRequest(
                f"--run-folder {folder} is not empty: give a new one, or --resume to go on with its run"
            )
    except OSError as error:
        raise StoreError(f"{folder} cannot be made ({error.strerror}): give another --run-folder") from error
    return run_id, folder


@contextmanager
def held(folder: Path, output: Path | None = None) -> Iterator[None]:
    """Hold a run's folder and its output folder; what a killed supervisor left running in it is ended first.

    Raises `InvalidRequest` where another supervisor has one of them: two trainers would mix their checkpoints.
    """
    with contextlib.ExitStack() as stack:
        _hold(
            stack, folder / _LOCK, f"another autotune supervises the run of {folder}: leave it to it, or end it first"
        )
        if output is not None:
            place = default_home() / "outputs"
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = hashlib.sha256(os.fsencode(os.path.realpath(output))).hexdigest()[:16]
            said = (
                f"another autotune run writes its checkpoints to {output}: end that one, or give another output folder"
            )
            _hold(stack, place / f"{name}.lock", said)
        for left in sorted(folder.glob("attempt-*/process.json")):
            end_leftovers(left)
        yield


def _hold(stack: contextlib.ExitStack, path: Path, said: str) -> None:
    from filelock import FileLock, Timeout

    try:
        stack.enter_context(FileLock(path, timeout=0, mode=0o600))
    except Timeout as error:
        raise InvalidRequest(said) from error


def interrupted_run(argv: Sequence[str], cwd: str) -> tuple[Path, RunState] | None:
    """The newest run of the same words in the same folder that neither ended well nor was given up."""
    root = runs_folder()
    for folder in sorted(root.iterdir() if root.is_dir() else (), reverse=True):
        try:
            state = read_state(folder)
        except AutotuneError:
            continue  # of another version
        if state is not None and not state.finished and list(state.argv) == list(argv) and state.cwd == cwd:
            return folder, state
    return None
