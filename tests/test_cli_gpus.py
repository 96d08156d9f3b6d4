"""`autotune gpus` and `autotune doctor`, with a fake driver and with none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autotune.cli.doctor import command as doctor
from autotune.cli.gpus import command as gpus
from autotune.hardware import checks
from autotune.hardware.ask import NoAnswer
from autotune.hardware.ask_versions import torch_build
from autotune.hardware.checks import Check, Status, check_device, check_disk, check_driver, check_package, run_checks
from autotune.hardware.nvml import NvmlReading
from autotune.hardware.readers import Machine
from autotune.values import GIB, MIB, Device, Tenant
from tests.fake_nvml import A100, MIG_SLICES, RTX_3060, RTX_4090, environment, run, without_driver
from tests.test_hardware_environment import Answering

GPUS = "from autotune.cli.gpus import command; command()"
DOCTOR = "from autotune.cli.doctor import command; command()"
CARD = Device(kind="cuda", index=0, name="NVIDIA L4", runtime="12.8", total_bytes=24 * GIB, free_bytes=20 * GIB)
CPU = Device(kind="cpu", index=None, name="a CPU")
TORCH = {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "hip": None,
    "devices": [{"kind": "cuda", "index": 0}],
    "problems": [],
}
VERSIONS: dict[str, Any] = {"python": "3.12.1", "versions": {"torch": "2.13.0+cu130", "bitsandbytes": "0.50.2"}}
LOADS = {"loaded": True, "library": "CudaBNBNativeLibrary"}


def test_gpus_lists_cards_their_tenants_and_the_cpu() -> None:
    env = environment(cards=f"{RTX_4090};{RTX_3060}", processes="0|4000001|512|compute", COLUMNS="200")
    done = run(GPUS, env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[1].split()[:5] == ["cuda:1", "NVIDIA", "GeForce", "RTX", "4090"]
    assert "24.0 GiB" in lines[1]
    assert "8.9" in lines[1]
    assert "1 other process" in lines[1]
    assert lines[2].startswith("cuda:0 ")
    assert lines[3].startswith("cpu ")
    assert lines[4] == "cuda:1: also used by train-4000001 (pid 4000001, 512.0 MiB)"


def test_gpus_as_json_is_one_document_in_bytes() -> None:
    done = run(GPUS, environment(cards=A100, mig=MIG_SLICES), "--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "autotune.gpus/1"
    seen = [(device["id"], device["mig"], device["total_bytes"]) for device in document["devices"][:3]]
    assert seen == [
        ("cuda:0", "1g.5gb", 4864 * MIB),
        (None, "enabled", 40960 * MIB),
        (None, "3g.20gb", 19968 * MIB),
    ]
    assert document["devices"][3]["id"] == "cpu"


def test_gpus_without_a_driver_says_so_on_stderr_and_lists_the_cpu(tmp_path: Path) -> None:
    done = run(GPUS, without_driver(tmp_path), "--json")
    assert done.returncode == 0
    assert "No GPU is visible" in done.stderr
    assert [device["id"] for device in json.loads(done.stdout)["devices"]] == ["cpu"]


def test_gpus_says_when_the_driver_does_not_answer() -> None:
    done = run(GPUS, environment(cards=RTX_3060, returns="nvmlInitWithFlags=9"))
    assert done.returncode == 0
    assert "Note: NVML: Driver Not Loaded" in done.stderr


def test_gpus_shows_what_could_not_be_read() -> None:
    done = run(GPUS, environment(cards=RTX_3060, returns="nvmlDeviceGetUUID=999"))
    assert "cuda:0: UUID: Unknown Error" in done.stdout


@pytest.mark.parametrize("code", [GPUS, DOCTOR])
def test_help_has_an_example_and_imports_nothing_heavy(code: str) -> None:
    probe = f"""
import atexit, sys
heavy = {{"torch", "pynvml", "rich.console", "humanize", "optuna"}}
atexit.register(lambda: print("heavy:", sorted(heavy & set(sys.modules))))
{code}
"""
    done = subprocess.run(
        [sys.executable, "-c", probe, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Example:\n    autotune " in done.stdout
    assert "heavy: []" in done.stdout


def machine(*devices: Device) -> Machine:
    return Machine(devices=(*devices, CPU))


def looked_at(home: Path, *devices: Device, **answers: Any) -> dict[str, Check]:
    """Every check of a machine with these devices, by name; `answers` replace what its Python says."""
    ask = Answering(**{"versions": VERSIONS, "torch": TORCH, "bitsandbytes": LOADS, **answers})
    driver = NvmlReading(devices=devices, driver="580.1", cuda="13.0", count=len(devices))
    found = run_checks(
        ask=ask, nvml=lambda _: driver, machine=lambda _: machine(*devices), environ={"AUTOTUNE_HOME": str(home)}
    )
    return {check.name: check for check in found}


def test_doctor_finds_this_environment_in_order(tmp_path: Path) -> None:
    done = run(DOCTOR, {**without_driver(tmp_path), "AUTOTUNE_HOME": str(tmp_path)}, "--json")
    document = json.loads(done.stdout)
    failed = [check for check in document["checks"] if check["status"] == "fail"]
    assert (document["schema"], document["ok"], failed) == ("autotune.doctor/1", True, [])
    assert done.returncode == 0
    names = [check["name"] for check in document["checks"]]
    assert {"python", "torch", "peft", "driver", "torch and GPU", "bitsandbytes library", "disk"} <= set(names)
    assert list(tmp_path.iterdir()) == [tmp_path / "libnvidia-ml.so.1"]


@pytest.mark.skipif(torch_build().get("cuda") is not None, reason="needs a CPU build of torch")
def test_doctor_fails_where_a_cpu_torch_sits_beside_a_gpu() -> None:
    done = run(DOCTOR, environment(cards=RTX_3060))
    assert done.returncode == 1
    assert "sees none of 1 GPU" in done.stdout
    assert "install a CUDA build of torch" in done.stdout


def test_doctor_says_that_a_python_cannot_be_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor, ["--python", str(tmp_path / "absent")])
    assert result.exit_code == 1
    assert "cannot be run" in result.output


def test_a_machine_in_order_passes(tmp_path: Path) -> None:
    found = looked_at(tmp_path, CARD)
    assert found["torch and GPU"].status is Status.OK
    assert found["bitsandbytes library"].status is Status.OK
    assert found["driver"].message == "NVIDIA 580.1, CUDA 13.0, 1 GPU"


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"devices": []}, Status.FAIL, "the driver runs CUDA 12.8 at most"),
        ({"devices": [], "cuda": None, "torch": "2.13.0+cpu"}, Status.FAIL, "install a CUDA build"),
        ({"devices": [], "cuda": "12.8"}, Status.FAIL, "restart"),
        ({"devices": [{"kind": "cuda"}, {"kind": "cuda"}]}, Status.WARN, "UUID"),
        ({"problems": ["CUDA error: out of memory"]}, Status.WARN, "free the card's memory"),
    ],
)
def test_torch_that_does_not_match_the_driver_says_what_to_do(
    tmp_path: Path, answer: dict[str, Any], status: Status, words: str
) -> None:
    check = looked_at(tmp_path, CARD, torch={**TORCH, **answer})["torch and GPU"]
    assert check.status is status
    assert words in (check.next_step or "")


def test_a_torch_that_hangs_and_a_missing_library_are_failures(tmp_path: Path) -> None:
    late = NoAnswer("no answer within 60 s")
    found = looked_at(tmp_path, CARD, torch=late, bitsandbytes={"loaded": False, "library": "Mock"})
    assert found["torch and GPU"].status is Status.FAIL
    assert found["bitsandbytes library"].status is Status.FAIL


def test_a_missing_package_names_the_command_that_installs_it(tmp_path: Path) -> None:
    check = looked_at(tmp_path, CARD)["peft"]
    assert (check.status, check.message) == (Status.FAIL, "not installed")
    assert "pip install 'peft>=" in (check.next_step or "")


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.17.1", Status.OK), ("0.17.0", Status.FAIL), ("0.18.0.dev0", Status.OK), ("local", Status.WARN)],
)
def test_a_package_is_held_to_its_lower_bound(version: str, status: Status) -> None:
    assert check_package("peft", version, "0.17.1").status is status


def test_a_driver_that_hangs_is_a_failure_and_no_hang() -> None:
    env = environment(cards=RTX_3060, hang="nvmlDeviceGetCount_v2")
    code = "from autotune.hardware import checks\nchecks._NVML_LIMIT_S = 0.5\nchecks._IMPORT_LIMIT_S = 0.5\n" + DOCTOR
    done = run(code, env)
    assert done.returncode == 1
    assert "NVML gave no answer within 0.5 s" in done.stdout


def test_a_data_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = {check.name: check for check in check_disk(tmp_path / "file")}
    assert found["database"].status is Status.FAIL
    assert "AUTOTUNE_HOME" in (found["database"].next_step or "")
    assert [check.status for check in check_disk(tmp_path / "new")] == [Status.OK, Status.OK]


@pytest.mark.parametrize(
    ("reading", "status"),
    [
        (NvmlReading(unavailable="NVML Shared Library Not Found", no_driver=True), Status.WARN),
        (NvmlReading(unavailable="Driver Not Loaded"), Status.FAIL),
        (NvmlReading(driver="580.1", count=2, problems=("GPU 1: GPU is lost",)), Status.WARN),
    ],
)
def test_what_is_wrong_with_the_driver_is_told_apart(reading: NvmlReading, status: Status) -> None:
    assert check_driver(reading).status is status


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ({"virtual": True}, "vGPU"),
        ({"unified_memory": True}, "machine's own"),
        ({"mig": "1g.5gb"}, "MIG slice 1g.5gb"),
        ({"tenants": (Tenant(pid=7, name="game", used_bytes=GIB),)}, "game (pid 7, 1.0 GiB)"),
        ({"problems": ("UUID: Unknown Error",)}, "UUID: Unknown Error"),
    ],
)
def test_what_is_particular_about_a_card_is_said(fact: dict[str, Any], words: str) -> None:
    (check,) = check_device(Device(kind="cuda", index=0, name="NVIDIA A100", **fact))
    assert words in check.message


@pytest.mark.parametrize(
    ("environ", "gpus", "warned"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, 2, True),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1, False),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 2, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, 2, False),
        ({}, 2, False),
    ],
)
def test_counting_cards_in_an_unstated_order_is_warned_of(environ: dict[str, str], gpus: int, warned: bool) -> None:
    names = [check.name for check in checks.check_platform(machine(CARD), environ, gpus)]
    assert ("device order" in names) is warned


def test_gpus_runs_in_this_process_too() -> None:
    result = CliRunner().invoke(gpus, ["--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["devices"][-1]["kind"] == "cpu"
