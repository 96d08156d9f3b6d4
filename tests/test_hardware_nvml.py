"""What NVML says, asked through the real pynvml of a fake driver."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from autotune.hardware.nvml import read_nvml
from autotune.hardware.visible import Card, Place, visible_places
from autotune.values import MIB
from tests.fake_nvml import A100, MIG_SLICES, RTX_3060, RTX_4090, environment, read, run, without_driver

CARDS = (Card("GPU-aaaa1111"), Card("GPU-aabb2222"), Card("GPU-cccc3333"))
SLICED = (Card("GPU-aaaa", slices=("MIG-1", "MIG-2")), Card("GPU-bbbb"))


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [2, 0]),
        (" 2 , 1 ", [2, 1]),
        ("0,2,-1,1", [0, 2]),
        ("0,9,1", [0]),
        ("1,1", []),
        ("1gpu", [1]),
        ("GPU-cccc3333", [2]),
        ("GPU-c,GPU-aaaa", [2, 0]),
        ("GPU-aa", []),
        ("GPU-c,GPU-none,GPU-aaaa", [2]),
        ("GPU-c,0", [2]),
        ("0,GPU-c", [0]),
        ("GPU-c,GPU-cccc", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(value: str | None, numbers: list[int]) -> None:
    assert visible_places(CARDS, value) == [Place(number) for number in numbers]


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (None, [Place(0, 0), Place(1)]),
        ("1,0", [Place(1), Place(0, 0)]),
        ("MIG-2", [Place(0, 1)]),
        ("MIG-1,MIG-2", [Place(0, 0)]),
        ("MIG-", []),
        ("GPU-aaaa", [Place(0, 0)]),
    ],
)
def test_a_process_sees_one_mig_slice(value: str | None, places: list[Place]) -> None:
    assert visible_places(SLICED, value) == places


def test_a_card_in_mig_mode_without_slices_is_not_enumerated() -> None:
    assert visible_places((Card("GPU-a", slices=()), Card("GPU-b")), None) == [Place(1)]


def test_every_field_of_a_card_is_read() -> None:
    reading = read(environment(cards=RTX_3060))
    (card,) = reading.devices
    assert (card.id, card.name, card.uuid) == ("cuda:0", "NVIDIA GeForce RTX 3060", "GPU-aaaa1111-0000")
    assert (card.total_bytes, card.free_bytes) == (12288 * MIB, 11776 * MIB)
    assert (card.compute_capability, card.driver, card.runtime) == ("8.6", "580.65.06", "13.0")
    assert (card.power_limit_w, card.display_active, card.virtual, card.mig) == (170.0, True, False, None)
    assert (card.problems, card.tenants, reading.count) == ((), (), 1)


def test_cards_are_counted_in_pci_order_whatever_order_nvml_has() -> None:
    devices = read(environment(cards=f"{RTX_4090};{RTX_3060}")).devices
    assert [(device.index, device.name[-4:]) for device in devices] == [(0, "3060"), (1, "4090")]


def test_index_is_the_position_among_the_visible() -> None:
    reading = read(environment(cards=f"{RTX_4090};{RTX_3060}", CUDA_VISIBLE_DEVICES="1"))
    assert [(device.index, device.name[-4:]) for device in reading.devices] == [(0, "4090")]
    assert reading.count == 2


def test_a_uuid_prefix_chooses_a_card() -> None:
    (card,) = read(environment(cards=f"{RTX_3060};{RTX_4090}", CUDA_VISIBLE_DEVICES="GPU-bbbb")).devices
    assert (card.index, card.name) == (0, "NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetName", "name"),
        ("nvmlDeviceGetUUID", "UUID"),
        ("nvmlDeviceGetPciInfo_v3", "PCI address"),
        ("nvmlDeviceGetMigMode", "MIG mode"),
        ("nvmlDeviceGetCudaComputeCapability", "compute capability"),
        ("nvmlDeviceGetVirtualizationMode", "virtualisation"),
        ("nvmlDeviceGetDisplayActive", "display"),
        ("nvmlDeviceGetComputeRunningProcesses_v3", "compute processes"),
        ("nvmlDeviceGetGraphicsRunningProcesses_v3", "graphics processes"),
    ],
)
def test_one_failing_call_costs_only_its_field(function: str, field: str) -> None:
    (card,) = read(environment(cards=RTX_3060, returns=f"{function}=999")).devices
    assert card.problems == (f"{field}: Unknown Error",)
    assert (card.index, card.total_bytes, card.power_limit_w) == (0, 12288 * MIB, 170.0)


def test_power_limit_comes_from_the_older_call_where_the_newer_fails() -> None:
    newer = "nvmlDeviceGetEnforcedPowerLimit=3"
    (card,) = read(environment(cards=RTX_3060, returns=newer)).devices
    assert (card.power_limit_w, card.problems) == (165.0, ())
    (card,) = read(environment(cards=RTX_3060, returns=f"{newer};nvmlDeviceGetPowerManagementLimit=3")).devices
    assert (card.power_limit_w, card.problems) == (None, ("power limit: Not Supported",))


def test_an_old_driver_without_newer_symbols_still_gives_the_card() -> None:
    (card,) = read(environment(cards=RTX_3060, defines=("-DOLD_DRIVER",))).devices
    assert (card.name, card.total_bytes, card.mig) == ("NVIDIA GeForce RTX 3060", 12288 * MIB, None)
    assert [problem.split(":")[0] for problem in card.problems] == [
        "MIG mode",
        "compute processes",
        "graphics processes",
    ]


def test_memory_that_no_call_supports_is_the_machines_own() -> None:
    both = "nvmlDeviceGetMemoryInfo=3;nvmlDeviceGetMemoryInfo_v2=3"
    (card,) = read(environment(cards="NVIDIA GB10|GPU-d|01|0|0|12.1", returns=both)).devices
    assert card.unified_memory
    assert card.total_bytes is not None
    assert 0 < card.total_bytes <= psutil.virtual_memory().total
    assert card.problems == ("memory: Not Supported",)


def test_memory_that_may_not_be_read_is_unknown_and_not_unified() -> None:
    both = "nvmlDeviceGetMemoryInfo=4;nvmlDeviceGetMemoryInfo_v2=4"
    (card,) = read(environment(cards=RTX_3060, returns=both)).devices
    assert (card.total_bytes, card.free_bytes, card.unified_memory) == (None, None, False)
    assert card.problems == ("memory: Insufficient Permissions",)


def test_other_processes_are_tenants_even_of_unknown_size() -> None:
    listed = "0|4000001|512|compute;0|4000002|na|compute;0|4000001|700|graphics"
    (card,) = read(environment(cards=RTX_3060, processes=listed)).devices
    assert [(tenant.pid, tenant.name, tenant.used_bytes) for tenant in card.tenants] == [
        (4000001, "train-4000001", 700 * MIB),
        (4000002, "train-4000002", None),
    ]


def test_own_processes_are_not_tenants() -> None:
    code = """
import os, subprocess, sys
child = subprocess.Popen(["sleep", "60"])
os.environ["FAKE_NVML_PROCESSES"] = ";".join(f"0|{pid}|512|compute" for pid in (os.getpid(), child.pid, os.getppid()))
from autotune.hardware.nvml import read_nvml
print([tenant.pid for tenant in read_nvml().devices[0].tenants])
child.kill()
child.wait()
"""
    done = run(code, environment(cards=RTX_3060))
    assert done.stdout.strip() == f"[{os.getpid()}]", done.stderr


def test_a_lost_gpu_does_not_hide_the_others() -> None:
    reading = read(environment(cards=f"{RTX_3060};{RTX_4090}", lost_0="1"))
    assert [(device.index, device.name) for device in reading.devices] == [(0, "NVIDIA GeForce RTX 4090")]
    assert reading.problems == ("GPU 0: GPU is lost",)


def test_a_vgpu_is_said_to_be_one() -> None:
    (card,) = read(environment(cards="GRID T4-8Q|GPU-e|01|8192|8000|7.5", vgpu="1")).devices
    assert (card.virtual, card.mig, card.problems) == (True, None, ())


def test_mig_slices_are_devices_of_their_own() -> None:
    reading = read(environment(cards=f"{A100};{RTX_4090}", mig=MIG_SLICES))
    seen = [(device.index, device.mig, (device.total_bytes or 0) // MIB, device.uuid) for device in reading.devices]
    assert seen == [
        (0, None, 24564, "GPU-bbbb2222-0000"),
        (1, "1g.5gb", 4864, "MIG-11111111-aaaa"),
        (None, "enabled", 40960, "GPU-cccc3333-0000"),
        (None, "3g.20gb", 19968, "MIG-22222222-bbbb"),
    ]
    assert "CUDA_VISIBLE_DEVICES=MIG-22222222-bbbb" in reading.devices[3].problems[0]
    assert reading.devices[1].slug == "nvidia-a100-sxm4-40gb-mig-1g-5gb-5gib"


def test_a_visible_mig_slice_is_device_zero_with_its_own_tenants() -> None:
    env = environment(
        cards=A100, mig=MIG_SLICES, processes="m1|4000001|512|compute", CUDA_VISIBLE_DEVICES="MIG-22222222-bbbb"
    )
    piece, parent = read(env).devices
    assert (piece.id, piece.mig, piece.compute_capability) == ("cuda:0", "3g.20gb", "8.0")
    assert [tenant.pid for tenant in piece.tenants] == [4000001]
    assert (parent.index, parent.mig) == (None, "enabled")


def test_a_slices_profile_comes_from_its_attributes_where_the_name_is_refused() -> None:
    env = environment(
        cards=A100,
        mig="0|MIG-1|unnamed|4864|4850",
        CUDA_VISIBLE_DEVICES="MIG-1",
    )
    assert read(env).devices[0].mig == "1g.5gb"


@pytest.mark.parametrize(("code", "words"), [(9, "Driver Not Loaded"), (18, "mismatch")])
def test_a_driver_that_does_not_start_is_a_reason_and_no_error(code: int, words: str) -> None:
    reading = read(environment(cards=RTX_3060, returns=f"nvmlInitWithFlags={code}"))
    assert reading.devices == ()
    assert words in (reading.unavailable or "")
    assert not reading.no_driver


def test_no_driver_is_said_to_be_none(tmp_path: Path) -> None:
    reading = read(without_driver(tmp_path))
    assert (reading.devices, reading.no_driver) == ((), True)


def test_reading_twice_in_one_process_gives_the_same() -> None:
    first = read_nvml({"CUDA_VISIBLE_DEVICES": ""})
    assert first == read_nvml({"CUDA_VISIBLE_DEVICES": ""})
    assert first.devices == ()
