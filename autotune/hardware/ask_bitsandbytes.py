"""Run by any Python, alone: whether bitsandbytes' native library loads, as JSON on the last line of stdout."""

from __future__ import annotations

import json


def native_library() -> dict[str, str | bool]:
    """`loaded`, and the library's class: bitsandbytes puts a mock in its place where loading failed."""
    from bitsandbytes import cextension

    name = type(cextension.lib).__name__
    return {"loaded": "Mock" not in name, "library": name}


if __name__ == "__main__":
    print("\n" + json.dumps(native_library()))
