"""The operating system below: Linux, WSL2, Windows or macOS."""

from __future__ import annotations

import platform
from pathlib import Path

PROC_VERSION = Path("/proc/version")


def is_wsl(proc_version: Path = PROC_VERSION) -> bool:
    """Whether this Linux runs under Windows: Microsoft's kernels name themselves in /proc/version."""
    try:
        return "microsoft" in proc_version.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return False


def operating_system(proc_version: Path = PROC_VERSION) -> str:
    """ "Linux", "Linux (WSL2)", "Windows" or "macOS"."""
    name = platform.system()
    if name == "Linux" and is_wsl(proc_version):
        return "Linux (WSL2)"
    return "macOS" if name == "Darwin" else name
