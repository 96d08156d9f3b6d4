"""The environment in which a training process finds the hook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

HOOK_FOLDER = Path(__file__).resolve().parent / "hook"


def hook_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with the hook's folder first on PYTHONPATH.

    Interpreters that ignore PYTHONPATH (`python -I`, `-E`) or sites (`-S`) run without the hook.
    """
    rest = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(HOOK_FOLDER)]
    return {**environ, "PYTHONPATH": os.pathsep.join([str(HOOK_FOLDER), *rest])}
