"""`autotune gpus`: the devices of this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from autotune.values import Device, to_json

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = "autotune.gpus/1"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document: bytes, watts, unknown is null.")
def command(as_json: bool) -> None:
    """List this machine's devices: memory, driver, and who else uses them.

    A GPU's id is what torch calls it where CUDA_VISIBLE_DEVICES is the same and CUDA_DEVICE_ORDER is PCI_BUS_ID.

    \b
    Example:
      autotune gpus
      CUDA_VISIBLE_DEVICES=1 autotune gpus --json
    """
    from autotune.hardware.readers import read_machine

    machine = read_machine()
    for problem in machine.problems:
        click.echo(f"Note: {problem}", err=True)
    if not machine.gpus:
        click.echo("No GPU is visible here: `autotune doctor` says why. The CPU can rehearse a fit.", err=True)
    if as_json:
        click.echo(
            json.dumps({"schema": SCHEMA, "devices": [document(device) for device in machine.devices]}, indent=2)
        )
        return
    from rich.console import Console

    console = Console()
    console.print(_table(machine.devices))
    for line in remarks(machine.devices):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def document(device: Device) -> dict[str, object]:
    """The device as JSON data, with the id that `--gpu` takes; null where no worker can reach it."""
    return {"id": device_id(device), **to_json(device)}


def device_id(device: Device) -> str | None:
    return device.id if device.kind == "cpu" or device.index is not None else None


def remarks(devices: tuple[Device, ...]) -> list[str]:
    """A line for each other process and each call that failed."""
    from autotune.hardware.sizes import format_bytes

    lines: list[str] = []
    for device in devices:
        name = device_id(device) or device.uuid or device.name
        for tenant in device.tenants:
            process = tenant.name or "a process"
            lines.append(f"{name}: also used by {process} (pid {tenant.pid}, {format_bytes(tenant.used_bytes)})")
        lines += [f"{name}: {problem}" for problem in device.problems]
    return lines


def _table(devices: tuple[Device, ...]) -> Table:
    from rich.table import Table

    from autotune.hardware.sizes import format_bytes

    table = Table(box=None, pad_edge=False)
    for heading in ("ID", "Name", "Memory", "Free", "Compute", "Driver", "About"):
        right = heading in ("Memory", "Free")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for device in devices:
        memory, free = format_bytes(device.total_bytes), format_bytes(device.free_bytes)
        facts = (device.compute_capability or "-", device.driver or "-", ", ".join(_about(device)) or "-")
        table.add_row(device_id(device) or "-", device.name, memory, free, *facts)
    return table


def _about(device: Device) -> list[str]:
    others = len(device.tenants)
    facts = {
        f"CUDA {device.runtime}": device.kind == "cuda" and device.runtime,
        f"HIP {device.runtime}": device.kind == "rocm" and device.runtime,
        f"{device.power_limit_w or 0:.0f} W": device.power_limit_w,
        "MIG parent" if device.mig == "enabled" else f"MIG {device.mig}": device.mig,
        "vGPU": device.virtual,
        "unified memory": device.unified_memory,
        "WSL2": device.wsl,
        "display": device.display_active,
        f"{others} other process{'es' if others > 1 else ''}": others,
    }
    return [text for text, holds in facts.items() if holds]
