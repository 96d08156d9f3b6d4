"""A fake NVIDIA driver: the real pynvml loads it in a process of its own, so nothing of ours is patched."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from autotune.hardware.nvml import NvmlReading
from autotune.values import Device, from_json

SOURCE = Path(__file__).parent / "native" / "fake_nvml.c"
RTX_3060 = "NVIDIA GeForce RTX 3060|GPU-aaaa1111-0000|01|12288|11776|8.6"
RTX_4090 = "NVIDIA GeForce RTX 4090|GPU-bbbb2222-0000|02|24564|20000|8.9"
A100 = "NVIDIA A100-SXM4-40GB|GPU-cccc3333-0000|03|40960|40000|8.0"
MIG_SLICES = (
    "0|MIG-11111111-aaaa|NVIDIA A100-SXM4-40GB MIG 1g.5gb|4864|4850;"
    "0|MIG-22222222-bbbb|NVIDIA A100-SXM4-40GB MIG 3g.20gb|19968|19900"
)

_READ = """
import dataclasses, json
from autotune.hardware.nvml import read_nvml
print(json.dumps(dataclasses.asdict(read_nvml())))
"""


@cache
def _built(defines: tuple[str, ...]) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is needed to build the fake NVIDIA driver")
    folder = Path(mkdtemp(prefix="fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    output = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", str(output), str(SOURCE)], check=True, timeout=60)
    return folder


def environment(*, defines: tuple[str, ...] = (), **variables: str) -> dict[str, str]:
    """The environment of a process that finds the fake driver. `cards=…` sets FAKE_NVML_CARDS; upper case is as is."""
    inherited = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    named = {key if key.isupper() else f"FAKE_NVML_{key.upper()}": value for key, value in variables.items()}
    return {**inherited, "LD_LIBRARY_PATH": str(_built(defines)), **named}


def without_driver(folder: Path) -> dict[str, str]:
    """An environment in which libnvidia-ml.so.1 is there and is no library, whatever this machine has."""
    (folder / "libnvidia-ml.so.1").write_bytes(b"")
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


def run(code: str, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def read(env: dict[str, str]) -> NvmlReading:
    """What `read_nvml()` finds in a fresh process."""
    done = run(_READ, env)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    devices = tuple(from_json(Device, device) for device in facts.pop("devices"))
    return NvmlReading(devices=devices, problems=tuple(facts.pop("problems")), **facts)
