"""Questions to another Python process, each with a time limit and an answer in JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from autotune.hardware.visible import WORKER_ENVIRONMENT

_HERE = Path(__file__).parent
_KILL_WAIT_S = 2.0


class NoAnswer(Exception):
    """The process could not be started, failed, took too long or said something else. The message says which."""


class Ask(Protocol):
    """Runs `ask_<question>.py` under a Python; raises NoAnswer."""

    def __call__(
        self, question: str, *arguments: str, python: str | None = None, timeout_s: float = 20.0
    ) -> dict[str, Any]: ...


def ask(question: str, *arguments: str, python: str | None = None, timeout_s: float = 20.0) -> dict[str, Any]:
    """The answer of `ask_<question>.py`, run by `python` (None: this one) with no folder of its own on its path.

    The process inherits this environment, with the CUDA device order that `Device.index` counts by. Raises NoAnswer.
    """
    executable = python or sys.executable
    command = [executable, "-P", str(_HERE / f"ask_{question}.py"), *arguments]
    return parse_answer(_run(command, timeout_s))


def _run(command: Sequence[str], timeout_s: float) -> str:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **WORKER_ENVIRONMENT},
        )
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from error
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        raise NoAnswer(f"no answer within {timeout_s:g} s") from None
    if process.returncode != 0:
        raise NoAnswer(_last_line(stderr) or _last_line(stdout) or f"exit code {process.returncode}")
    return stdout


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it, and wait a moment only: a process stuck in a driver's call outlives its kill."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_KILL_WAIT_S)


def parse_answer(output: str) -> dict[str, Any]:
    """The JSON object on the last line; libraries may print before it. Raises NoAnswer."""
    try:
        answer = json.loads(_last_line(output))
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise NoAnswer(f"it printed {_last_line(output)[:80]!r} instead of an answer")
    return answer


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()
