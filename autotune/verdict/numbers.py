"""Numbers that an out-of-memory message carries, in bytes."""

from __future__ import annotations

import re

from autotune.verdict.rules import compiled

_POWERS = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_LARGEST = 2**63  # above it a counter has wrapped: torch has printed an unknown 2^64 - 1 as 17179869184.00 GiB

#: A size with its unit, named so that several can stand in one pattern.
_SIZE = r"(?P<{0}>\d[\d,]{{0,24}}(?:\.\d{{1,12}})?)\s*(?P<{0}_unit>bytes?|[kmgtpe]i?b|[kmgtpe]|b)\b"


def _sizes(pattern: str) -> re.Pattern[str]:
    return compiled(re.sub(r"(?<!P)<(\w+)>", lambda match: _SIZE.format(match[1]), pattern))


#: Each pattern names what it reads: `<tried>` is a size that becomes `tried_bytes`. The first to find a key keeps it.
_PATTERNS = (
    # torch 1.1-2.0: (GPU 0; … total capacity; … already allocated; … free; … reserved in total by PyTorch)
    _sizes(r"tried to allocate(?: more than)? <tried>"),
    _sizes(r"<total> total capacity"),
    _sizes(r"<allocated> already allocated"),
    _sizes(r"<free> free;"),
    _sizes(r"<reserved> reserved in total by pytorch"),
    _sizes(r"<reserved_unallocated> cached\)"),  # torch 1.1-1.3: held and not in use
    # torch 2.1 and later
    _sizes(r"total capaci?ty of <total> of which <free> is free"),
    _sizes(r"this process has <process> memory in use"),
    _sizes(r"\bprocess \d+ has <process> memory in use"),
    _sizes(r"<allowed> allowed;"),
    _sizes(r"of the allocated memory <allocated> is allocated by pytorch"),
    _sizes(r"and <reserved_unallocated> is reserved by pytorch but unallocated"),
    # cudaMallocAsync
    _sizes(r"currently allocated\s*: <allocated>"),
    _sizes(r"requested\s*: <tried>"),
    _sizes(r"device limit\s*: <total>"),
    _sizes(r"free \(according to cuda\)\s*: <free>"),
    _sizes(r"memory fraction\)\s*: <allowed>"),
    # MPS, Metal
    _sizes(r"mps allocated: <allocated>"),
    _sizes(r"max allowed: <allowed>"),
    _sizes(r"invalid buffer size: <tried>"),
    _sizes(r"attempting to allocate <tried> which is greater than the maximum allowed buffer size of <allowed>"),
    # the host: torch, numpy, Rust, Arrow
    _sizes(r"unable to allocate <tried> for an array"),
    _sizes(r"memory allocation of <tried> failed"),
    _sizes(r"unable to mmap <tried>"),
    # TensorFlow, XLA, CuPy, Paddle, llama.cpp, vLLM
    _sizes(r"failed to alloc(?:ate)? [\d.]+\w{1,3} \(<tried>"),
    _sizes(r"failed to alloc(?:ate)? (?:request for )?<tried>"),
    _sizes(r"(?:trying|attempting) to (?:allocate|reserve) <tried>"),
    _sizes(r"out of memory allocating <tried> \(allocated so far: <allocated>"),
    _sizes(r"limit set to: <allowed>"),
    _sizes(r"cannot allocate <tried>\s?memory on [^\n]{0,40}?<allocated> memory has been allocated"),
    _sizes(r"available memory is only <free>"),
    _sizes(r"cannot allocate <tried>\s?memory on"),
    _sizes(r"\ballocating <tried> on device"),
    compiled(r"buffer of size (?P<tried>\d+)\b"),
    compiled(r"\ballocat(?:e|ing) (?P<tried>\d+) bytes"),
    _sizes(
        r"free memory on device [^\n]{0,20}\((?P<free>[\d.]{1,12})(?=/[\d.]{1,12}\s?(?P<free_unit>[kmgt]i?b))/<total>\)"
    ),
)


def parse_bytes(number: str, unit: str = "") -> int:
    """Bytes of "10.01", "GiB". Powers of 1024 whatever the spelling: torch, TensorFlow and Metal write GB for GiB."""
    scale: int = 1024 ** _POWERS[unit.lower()[:1]]
    return int(number.replace(",", "")) * scale if "." not in number else round(float(number.replace(",", "")) * scale)


def read_numbers(text: str) -> dict[str, int]:
    """Bytes found in a message, by name; what it does not say is left out.

    Keys: tried_bytes, free_bytes, total_bytes, allocated_bytes, reserved_bytes, process_bytes, allowed_bytes,
    reserved_unallocated_bytes. `reserved_bytes` is added up where the message gives its two parts.
    """
    found: dict[str, int] = {}
    text = text.lower()
    for pattern in _PATTERNS:
        match = pattern.search(text)
        if match:
            for key, value in _values(match).items():
                if value < _LARGEST:
                    found.setdefault(key, value)
    if "reserved_bytes" not in found and "reserved_unallocated_bytes" in found and "allocated_bytes" in found:
        found["reserved_bytes"] = found["allocated_bytes"] + found["reserved_unallocated_bytes"]
    return found


def _values(match: re.Match[str]) -> dict[str, int]:
    groups = match.groupdict()
    return {
        f"{name}_bytes": parse_bytes(number, groups.get(f"{name}_unit") or "")
        for name, number in groups.items()
        if not name.endswith("_unit") and number is not None
    }
