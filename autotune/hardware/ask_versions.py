"""Run by any Python, alone: which version of each package it has, as JSON. Standard library only."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys


def installed_versions(names: list[str]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Imports none of them."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    version: str | None = found.version
    return (_torch_build_version(found) or version) if name == "torch" else version


def _torch_build_version(found: importlib.metadata.Distribution) -> str | None:
    """torch.__version__ as its version.py states it: PyPI's metadata leaves out the build ("+cu130")."""
    return torch_build(found).get("version")


def torch_build(found: importlib.metadata.Distribution | None = None) -> dict[str, str | None]:
    """version, cuda, hip and xpu of the installed torch, read from its version.py without importing it.

    An empty dict: torch is not installed, or its file is not where it always was.
    """
    try:
        found = found or importlib.metadata.distribution("torch")
        with open(str(found.locate_file("torch/version.py")), encoding="utf-8") as file:
            text = file.read()
    except (importlib.metadata.PackageNotFoundError, OSError):
        return {}
    facts: dict[str, str | None] = {}
    for key in ("__version__", "cuda", "hip", "xpu"):
        match = re.search(rf"^{key}\b[^=\n]*=\s*(?:'([^']*)'|\"([^\"]*)\"|None)", text, re.MULTILINE)
        facts[key.strip("_")] = (match[1] or match[2]) if match else None
    return facts


def main() -> None:
    names = sys.argv[1:]
    facts = {"python": platform.python_version(), "versions": installed_versions(names), "torch_build": torch_build()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
