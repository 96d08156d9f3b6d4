"""Run by any Python, alone: what its torch sees, as JSON on the last line of stdout. The parent never imports torch."""

from __future__ import annotations

import json
from typing import Any


def facts() -> dict[str, Any]:
    """torch's version and build, and every device of torch.cuda (ROCm too) and torch.xpu."""
    import torch

    problems: list[str] = []
    kind = "rocm" if torch.version.hip else "cuda"
    devices = _devices(torch, torch.cuda, kind, problems)
    if hasattr(torch, "xpu"):
        devices += _devices(torch, torch.xpu, "xpu", problems)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices,
        "problems": problems,
    }


def _devices(torch: Any, backend: Any, kind: str, problems: list[str]) -> list[dict[str, Any]]:
    try:
        count = backend.device_count() if backend.is_available() else 0
    except (RuntimeError, AssertionError) as error:
        problems.append(_first_line(error))
        return []
    return [_device(backend, kind, index, problems) for index in range(count)]


def _device(backend: Any, kind: str, index: int, problems: list[str]) -> dict[str, Any]:
    """Properties, then memory; the second starts a context on the device, which a full card can refuse."""
    found: dict[str, Any] = {"kind": kind, "index": index}
    try:
        properties = backend.get_device_properties(index)
        found["name"] = properties.name
        found["total_bytes"] = properties.total_memory
        found["architecture"] = _architecture(properties, kind)
        for key in ("pci_domain_id", "pci_bus_id", "pci_device_id"):
            found[key] = getattr(properties, key, None)
        found["integrated"] = bool(getattr(properties, "is_integrated", getattr(properties, "is_integrated_gpu", 0)))
        found["uuid"] = str(properties.uuid) if getattr(properties, "uuid", None) is not None else None
        found["driver"] = getattr(properties, "driver_version", None)
        found["free_bytes"], found["total_bytes"] = backend.mem_get_info(index)
    except (RuntimeError, AssertionError) as error:
        problems.append(f"{kind} device {index}: {_first_line(error)}")
    return found


def _architecture(properties: Any, kind: str) -> str | None:
    """gfx name on ROCm (without its feature flags), compute capability on CUDA."""
    if kind == "rocm":
        return str(properties.gcnArchName).split(":")[0]
    return f"{properties.major}.{properties.minor}" if kind == "cuda" else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    print("\n" + json.dumps(facts()))
