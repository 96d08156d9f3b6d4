"""How `autotune fit` narrows its search: --fix, --exclude and a --space file."""

from __future__ import annotations

from typing import Any

from autotune.configfile import read_keys
from autotune.hardware.environment import is_own_python
from autotune.search.narrow import Narrowing, read_narrowing
from autotune.workload.models import check_optimizer


def narrowing_of(options: dict[str, Any]) -> Narrowing:
    """What may be tried. Raises `UsageError`, `InvalidRequest`."""
    space = read_keys(options["space"]) if options["space"] else {}
    narrowing = read_narrowing(options["fix"] or (), options["exclude"] or (), space)
    if is_own_python(options["python"]):
        for option, pairs in (("--fix optimizer", narrowing.fixed), ("--exclude optimizer", narrowing.excluded)):
            for name in [value for field, value in pairs if field == "optimizer"]:
                check_optimizer(name, option=option)
    return narrowing
