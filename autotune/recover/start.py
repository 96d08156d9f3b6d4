"""Start a command under its keeper: pipes for its output, one for the keeper's word, errors as a shell has them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune.errors import AutotuneError
from autotune.recover.limits import fraction_environment
from autotune.recover.processes import MARK, PROCESS_FILE
from autotune.recover.watching import AttemptLimits

_KEEPER = Path(__file__).with_name("keeper.py")


class SupervisorFailed(AutotuneError):
    """The supervisor itself could not do its work."""

    exit_code = 125


class CommandNotExecutable(AutotuneError):
    """The command is there and cannot be started."""

    exit_code = 126


class CommandNotFound(AutotuneError):
    """There is no such command."""

    exit_code = 127


RANK_LOGS = "ranks"  # folder of an attempt in which torchrun keeps each rank's output; its lines name their rank, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A keeper that is on its way, and our ends of its pipes."""

    keeper: subprocess.Popen[bytes]
    stdout: int
    stderr: int
    status: int


def start(argv: Sequence[str], *, place: Path, cwd: Path, environ: Mapping[str, str], limits: AttemptLimits) -> Started:
    """Start `argv` in a session of its own. `place` is the attempt's folder. Raises `SupervisorFailed`.

    Standard input is empty: a run that may start again by itself cannot read twice. Descriptors above 2 that we were
    given are passed on.
    """
    ends = [os.pipe() for _ in range(3)]
    status = ends[2][1]
    record = place / PROCESS_FILE
    limit = str(limits.data_bytes or 0)
    command = [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), str(status), str(record), limit, *argv]
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.set_inheritable(status, True)
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=ends[0][1],
            stderr=ends[1][1],
            cwd=cwd,
            env=environment(environ, place, limits),
            close_fds=False,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a word
        for read, _ in ends:
            os.close(read)
        raise SupervisorFailed(
            f"the command could not be started in {cwd} ({error}): see that this is no longer so"
        ) from error
    finally:
        for _, write in ends:
            os.close(write)
    return Started(keeper=keeper, stdout=ends[0][0], stderr=ends[1][0], status=ends[2][0])


def environment(environ: Mapping[str, str], place: Path, limits: AttemptLimits) -> dict[str, str]:
    """The command's environment: marked as ours, its memory limit, and output that comes as it is printed."""
    result = dict(environ)
    result.setdefault("PYTHONUNBUFFERED", "1")  # or a killed trainer's last words are lost in its buffer
    result |= fraction_environment(result, limits.memory_fraction)
    apart = {"PET_TEE": "3", "PET_LOG_DIR": str(place / RANK_LOGS)}  # torchrun's options, where they are not stated
    result |= {name: value for name, value in {**_screen(), **apart}.items() if name not in result}
    return {**result, MARK: str(place.resolve())}


def _screen() -> dict[str, str]:
    """The terminal's size, which progress bars cannot ask a pipe for."""
    try:
        size = os.get_terminal_size(2)
    except OSError:
        return {}
    return {"COLUMNS": str(size.columns), "LINES": str(size.lines)} if size.columns else {}


def cannot_start(command: str, number: int, environ: Mapping[str, str]) -> AutotuneError:
    """What to raise where exec of `command` failed with errno `number`."""
    found = shutil.which(command, path=environ.get("PATH"))
    if number in (errno.ENOENT, errno.ENOTDIR) and found:
        return CommandNotExecutable(f"{found} names an interpreter in its first line that is not there: mend that line")
    if number in (errno.ENOENT, errno.ENOTDIR):
        return CommandNotFound(f"{command}: command not found; give its path, or the program that runs it after --")
    if number == errno.ENOEXEC:
        return CommandNotExecutable(
            f"{command} has no first line that names its interpreter: add one such as #!/bin/sh, or put it in front"
            f" (sh {command})"
        )
    reason = os.strerror(number)
    return CommandNotExecutable(
        f"{command} cannot be executed ({reason}): start it with its interpreter, or chmod +x it"
    )
