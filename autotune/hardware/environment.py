"""The software that a measurement depends on, read without importing any of it."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import autotune
from autotune.errors import InvalidRequest
from autotune.hardware.ask import Ask, NoAnswer, ask
from autotune.hardware.ask_versions import installed_versions
from autotune.hardware.system import operating_system
from autotune.values import LIBRARIES, Device, Environment


def read_environment(python: str | None, device: Device, threads: int | None = None, *, ask: Ask = ask) -> Environment:
    """Versions that `python` (None: this one) has installed. torch's build ("+cpu", "+cu130") is part of its version.

    `threads` is torch's thread count on a CPU target. Raises InvalidRequest where that python cannot be run.
    """
    facts = _versions(python, ask)
    versions = facts["versions"]
    return Environment(
        driver=device.driver,
        torch=versions["torch"],
        transformers=versions["transformers"],
        peft=versions["peft"],
        bitsandbytes=versions["bitsandbytes"],
        accelerate=versions["accelerate"],
        trl=versions["trl"],
        python=facts["python"],
        os=operating_system(),
        threads=threads,
        autotune=autotune.__version__,
    )


def _versions(python: str | None, ask: Ask) -> dict[str, Any]:
    if is_own_python(python):
        return {"python": platform.python_version(), "versions": installed_versions(list(LIBRARIES))}
    try:
        return ask("versions", *LIBRARIES, python=python)
    except NoAnswer as error:
        raise InvalidRequest(
            f"{python} cannot be run as a Python of 3.11 or newer ({error}): give --python the interpreter of your"
            " trainer's environment, like /path/to/venv/bin/python"
        ) from error


def is_own_python(python: str | None) -> bool:
    """Whether `python` is the interpreter that runs this. A virtual environment's link to it is another one."""
    return python is None or os.path.abspath(python) == os.path.abspath(sys.executable)
