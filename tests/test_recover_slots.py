from __future__ import annotations

import pytest

from autotune.recover.job import Waiting
from autotune.recover.slots import CPU, Slot, place, read_slots, slot_environ

TWO = (
    Slot("cuda:0", "cuda", "NVIDIA GeForce RTX 4090", "GPU-aaaa"),
    Slot("cuda:1", "cuda", "NVIDIA RTX A6000", "GPU-bbbb"),
    CPU,
)
ROCM = (Slot("cuda:0", "rocm", "AMD Instinct"), Slot("cuda:1", "rocm", "AMD Instinct"), CPU)


def waiting(*wanted: str) -> list[Waiting]:
    return [Waiting(number, gpu, "") for number, gpu in enumerate(wanted, start=1)]


@pytest.mark.parametrize(
    ("wanted", "busy", "share", "placed"),
    [
        (["auto", "auto", "auto"], {}, 1, {1: "cuda:0", 2: "cuda:1"}),
        (["auto"], {"cuda:0": 1}, 1, {1: "cuda:1"}),
        (["auto"], {"cuda:0": 1, "cuda:1": 1}, 1, {}),
        (["auto"] * 4, {"cuda:0": 1}, 2, {1: "cuda:1", 2: "cuda:0", 3: "cuda:1"}),
        (["cpu", "cpu", "auto"], {}, 1, {1: "cpu", 3: "cuda:0"}),
        (["cuda:1", "cuda:1", "auto"], {}, 1, {1: "cuda:1", 3: "cuda:0"}),
        (["cuda", "cuda:7"], {}, 1, {1: "cuda:0"}),
        (["GPU-bb", "gpu-AAAA"], {}, 1, {1: "cuda:1", 2: "cuda:0"}),
        (["RTX 4090", "a6000", "RTX 3060"], {}, 1, {1: "cuda:0", 2: "cuda:1"}),
        (["all", "auto"], {}, 1, {1: "all"}),
        (["all", "auto", "cpu"], {"cuda:1": 1}, 1, {3: "cpu"}),  # nothing overtakes it on a GPU
        (["auto"], {"all": 1}, 2, {}),
    ],
)
def test_jobs_go_to_the_devices_they_want(
    wanted: list[str], busy: dict[str, int], share: int, placed: dict[int, str]
) -> None:
    assert {job.id: device for job, device in place(waiting(*wanted), TWO, busy, share)} == placed


@pytest.mark.parametrize("wanted", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_is_the_one_slot(wanted: str) -> None:
    assert [(job.id, device) for job, device in place(waiting(wanted, "cuda:0"), [CPU], {}, 1)] == [(1, "cpu")]


def test_every_gpu_of_a_machine_without_one_is_the_cpu() -> None:
    assert [device for _, device in place(waiting("all", "auto"), [CPU], {}, 1)] == ["all"]
    assert place(waiting("auto"), [CPU], {"all": 1}, 1) == []


@pytest.mark.parametrize(
    ("device", "slots", "environ", "said"),
    [
        ("cuda:1", TWO, {}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-bbbb"}),
        ("cpu", TWO, {}, {"CUDA_VISIBLE_DEVICES": ""}),
        ("all", TWO, {}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        ("cuda:1", ROCM, {}, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "HIP_VISIBLE_DEVICES": "1"}),
        (
            "cuda:1",
            ROCM,
            {"HIP_VISIBLE_DEVICES": "4, 6"},
            {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "HIP_VISIBLE_DEVICES": "6"},
        ),
    ],
)
def test_a_supervisor_sees_its_device_alone(
    device: str, slots: tuple[Slot, ...], environ: dict[str, str], said: dict[str, str]
) -> None:
    assert slot_environ(device, slots, environ) == said


def test_this_machines_slots_end_with_its_cpu() -> None:
    assert read_slots()[-1] == CPU
