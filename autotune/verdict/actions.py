"""What to do: one sentence per verdict and family, and what the numbers of a message add to it."""

from __future__ import annotations

from collections.abc import Mapping

from autotune.values import GIB, MIB, Verdict
from autotune.verdict.rules import Kind

_DEFAULT_ACTION: dict[Verdict, str] = {
    Verdict.FITS: "Use this config: it ran within the limit.",
    Verdict.DEVICE_OOM: (
        "Take a config that needs less device memory: a smaller micro batch with more accumulation, gradient"
        " checkpointing, a chunked loss."
    ),
    Verdict.HOST_OOM: (
        "Free or add system RAM: fewer data-loader workers, less offloading, a higher memory limit of the job;"
        " a smaller micro batch does not help."
    ),
    Verdict.NOT_OOM: "Mend the error that the evidence names; a smaller config does not help.",
    Verdict.AMBIGUOUS: "Settle it first, then choose: a smaller config helps only if it was memory.",
    Verdict.TIMEOUT: "Raise the time limit of this phase, or look for what hangs; do not take it for out of memory.",
    Verdict.SPILL: (
        "Take a config that needs less device memory, and turn the driver's system-memory fallback off:"
        " it runs from system RAM now."
    ),
    Verdict.DEVICE_LOST: (
        "Reset the device or restart the machine and look at the driver's log, then run the same config again."
    ),
    Verdict.INTERRUPTED: "Start it again when wanted: it was stopped from outside.",
}

_KIND_ACTION: dict[Kind, str] = {
    Kind.SHARED_MEMORY: (
        "Enlarge /dev/shm (docker run --shm-size, an emptyDir of medium Memory) or use fewer data-loader workers;"
        " a smaller micro batch does not help."
    ),
    Kind.HOST_KILL: (
        "Give the job more system RAM or use less of it (fewer workers, less offloading, no second copy of the"
        " weights); a smaller micro batch does not help."
    ),
    Kind.LOST: (
        "Check the device itself (driver log, ECC counters, other users), reset it, and run the same config again;"
        " a smaller config does not help."
    ),
    Kind.RESOURCE: "Mend what the evidence names: it is not the device's memory, so a smaller config does not help.",
    Kind.HANDLED: "Nothing: the program caught its lack of memory and went on.",
    Kind.TALK: "Nothing: the text speaks of memory, and no error about it is in there.",
}

_SETTLE: dict[Kind, str] = {
    Kind.BARE: "whether pinning host memory failed: free memory on the card, and free system RAM, at that time",
    Kind.LIBRARY: (
        "free memory on the card when it died: under 256 MiB it was out of memory, over 2 GiB and a fifth of the card"
        " it was not"
    ),
    Kind.LOST: "free memory on the card when it died, and the driver's log",
    Kind.SUSPECT: "whether the process was at its memory or thread limit (ulimit -a, the cgroup's memory and pids)",
    Kind.CAPACITY: "free memory on the card before the start against the bytes of the model",
    Kind.KILL: "the kernel log (dmesg) or oom_kill in the cgroup's memory.events at that time",
    Kind.WRAPPER: "the error of the attempt before it, further up in the log",
    Kind.FOLLOW: "the first error of the process or rank that failed first, in its own log",
}

_LOST_IN_SPACE = 4  # times the card: no batch size explains such a request


def action_for(verdict: Verdict, kind: Kind | None) -> str:
    """The action of a verdict, more specific where the family says more."""
    if kind is not None and verdict in (Verdict.HOST_OOM, Verdict.NOT_OOM):
        return _KIND_ACTION.get(kind, _DEFAULT_ACTION[verdict])
    return _DEFAULT_ACTION[verdict]


def settle_for(kind: Kind | None) -> str:
    """What would settle an ambiguous case."""
    return _SETTLE.get(kind, _NOTHING_KNOWN) if kind is not None else _NOTHING_KNOWN


_NOTHING_KNOWN = "the end of the run's stderr, and its exit code"


def remarks(numbers: Mapping[str, int]) -> tuple[tuple[str, ...], str | None]:
    """What the numbers of a device's out-of-memory message say besides: evidence, and an action where it changes."""
    tried, total, free = (numbers.get(f"{key}_bytes") for key in ("tried", "total", "free"))
    allocated = numbers.get("allocated_bytes")
    lines: list[str] = []
    action = None
    if total is not None and allocated is not None and allocated > total:
        lines.append(
            f"already allocated {gib(allocated)} > total capacity {gib(total)}: the driver had spilled into system"
            " memory before it failed"
        )
    others = other_tenants_bytes(numbers)
    if others is not None:
        lines.append(
            f"about {gib(others)} of the card's {gib(total or 0)} is not this process's: another process holds it"
        )
        action = (
            "End the other process on this card, or take another card; this run itself used far less than there is."
        )
    if tried is not None and free is not None and free > tried:
        lines.append(
            f"{gib(free)} was free for a request of {gib(tried)}: fragmentation, or a limit below the card's size"
        )
    ceiling = max((value for value in (total, numbers.get("allowed_bytes")) if value), default=None)
    if tried is not None and (tried >= 2**60 or (ceiling is not None and tried > ceiling)):
        lines.append(
            f"one request of {gib(tried)} alone is larger than the device" + (f" ({gib(ceiling)})" if ceiling else "")
        )
        action = (
            "A smaller batch cannot help: look for a wrong shape or setting (an overflow, a sequence or image far too"
            " long, an attention that keeps the whole matrix)."
        )
        if ceiling is not None and tried < _LOST_IN_SPACE * ceiling:
            action = (
                "A smaller batch cannot be counted on: one tensor is larger than the device, so look at its shape first"
                " (sequence length, vocabulary, an attention that keeps the whole matrix)."
            )
    return tuple(lines), action


def other_tenants_bytes(numbers: Mapping[str, int]) -> int | None:
    """Bytes of the card that neither are free nor this process's, where they are much; None otherwise or unknown."""
    total, free = numbers.get("total_bytes"), numbers.get("free_bytes")
    own = numbers.get("process_bytes", numbers.get("reserved_bytes", numbers.get("allocated_bytes")))
    if total is None or free is None or own is None:
        return None
    others = total - free - own
    return others if others > max(GIB, total // 10) else None


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB // 10 else f"{count / MIB:,.1f} MiB"
