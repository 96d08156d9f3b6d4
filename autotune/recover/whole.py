"""Whether a file of a checkpoint is all there, by its own framing: headers and ends are read, contents are not.

A file cut off anywhere, or empty, is found out. One of the right length with wrong bytes within is not.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

_END = struct.Struct("<4s4H2LH")  # of a zip's end of central directory: APPNOTE.TXT 4.3.16
_END_64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_LOCATOR_64 = struct.Struct("<4sLQL")  # 4.3.15
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors format itself allows


def broken(path: Path) -> str | None:
    """Why the file is not whole, or None; of a kind that is not known only that it is not empty."""
    try:
        size = path.stat().st_size
        if size == 0:
            return f"{path.name} is empty"
        check = {".safetensors": _safetensors, ".pt": _archive, ".pth": _archive, ".bin": _archive}.get(path.suffix)
        reason = check(path, size) if check else None
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return f"{path.name} {reason}" if reason else None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where it is not one, or is not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _safetensors(path: Path, size: int) -> str | None:
    """Eight bytes of length, a JSON header of that length, then what its tensors' offsets say."""
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
            return "is cut off in its header"
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "has a header that cannot be read"
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"has {size:,} bytes where its header says {wanted:,}"


def _archive(path: Path, size: int) -> str | None:
    """The zip archive that torch.save writes: its central directory ends where the file does."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return "is no archive of torch"
        file.seek(-min(size, _END.size), os.SEEK_END)
        end = file.read()
        if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
            return "is cut off"
        _, _, _, _, _, length, offset, comment = _END.unpack(end)
        last = size - _END.size
        wide = _wide_end(file, last)
        if wide is not None:
            length, offset, last = wide
        if comment or offset + length != last:
            return "is cut off, or holds something else"
        file.seek(offset)
        return None if not length or file.read(4) == b"PK\x01\x02" else "has a directory that cannot be read"


def _wide_end(file: Any, end: int) -> tuple[int, int, int] | None:
    """(length, offset) of the central directory and where it ends, from a zip64's records before `end`; None: none."""
    place = end - _LOCATOR_64.size
    if place < _END_64.size:
        return None
    file.seek(place)
    magic, _, record, _ = _LOCATOR_64.unpack(file.read(_LOCATOR_64.size))
    if magic != b"PK\x06\x07" or record + _END_64.size > place:
        return None
    file.seek(record)
    fields = _END_64.unpack(file.read(_END_64.size))
    return None if fields[0] != b"PK\x06\x06" else (fields[8], fields[9], record)
