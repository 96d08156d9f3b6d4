"""What a dying process says of the exception that it dies of."""

from __future__ import annotations

import traceback
from typing import Any

_TRACEBACK_CHARS = 16 * 1024
_MESSAGE_CHARS = 4 * 1024
#: What a launcher raises because one of its processes died: that one has said why.
_LAUNCHERS = frozenset({"ChildFailedError", "CalledProcessError", "ProcessExitedException", "ProcessRaisedException"})


def describe(error: BaseException) -> dict[str, Any]:
    """The fields `exception`, `message`, `traceback` and `oom` of a "died" event."""
    text = "".join(traceback.format_exception(error))
    return {
        "exception": class_name(error),
        "message": str(error)[:_MESSAGE_CHARS],
        "traceback": text[-_TRACEBACK_CHARS:],
        "oom": is_out_of_memory(error),
    }


def class_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the device's or the host's: by its class, else by its words."""
    if any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__):
        return True
    from autotune.values import Verdict
    from autotune.verdict.text import classify_text

    judgement = classify_text(f"{class_name(error)}: {error}")
    return judgement.verdict in (Verdict.DEVICE_OOM, Verdict.HOST_OOM)


def is_launchers(error: BaseException) -> bool:
    """Whether this only says that another process has died."""
    return type(error).__name__ in _LAUNCHERS
