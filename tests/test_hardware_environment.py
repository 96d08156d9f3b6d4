"""The CPU, other makers' cards, the software around, and the machine as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from autotune.errors import InvalidRequest
from autotune.hardware.ask import NoAnswer, ask, parse_answer
from autotune.hardware.ask_versions import installed_versions, torch_build
from autotune.hardware.cpu import cgroup_memory, host_memory, processor_name, read_cpu
from autotune.hardware.environment import read_environment
from autotune.hardware.nvml import NvmlReading
from autotune.hardware.readers import MachineReader, read_machine
from autotune.hardware.rocm import TorchReading, read_amdsmi, read_torch_devices, worth_asking
from autotune.hardware.system import is_wsl, operating_system
from autotune.values import GIB, MIB, Device

CPU = Device(kind="cpu", index=None, name="a CPU", total_bytes=8 * GIB)
NVIDIA = Device(kind="cuda", index=0, name="NVIDIA L4", driver="580.1", total_bytes=24 * GIB, free_bytes=20 * GIB)
RADEON = Device(kind="rocm", index=0, name="AMD Radeon RX 9070", total_bytes=16 * GIB, free_bytes=15 * GIB)


class Answering:
    """An `Ask` with its answers at hand; notes what it was asked."""

    def __init__(self, **answers: dict[str, Any] | NoAnswer) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str | None]] = []

    def __call__(
        self, question: str, *arguments: str, python: str | None = None, timeout_s: float = 20.0
    ) -> dict[str, Any]:
        self.asked.append((question, python))
        answer = self.answers[question]
        if isinstance(answer, NoAnswer):
            raise answer
        return answer


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="ascii")


def test_processor_is_named_as_linux_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD  EPYC 7763\nmodel name\t: other\n")
    assert processor_name(tmp_path / "cpuinfo") == "AMD EPYC 7763"


def test_a_processor_without_a_name_still_has_one(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_name(tmp_path / "cpuinfo")
    assert processor_name(tmp_path / "absent")


def test_the_cpu_has_no_driver_and_real_memory() -> None:
    cpu = read_cpu()
    assert (cpu.id, cpu.driver, cpu.index) == ("cpu", None, None)
    assert cpu.free_bytes is not None
    assert cpu.total_bytes is not None
    assert 0 < cpu.free_bytes <= cpu.total_bytes <= psutil.virtual_memory().total


def test_cgroup_2_limits_of_every_ancestor_count(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/slice/job\n")
    root = tmp_path / "fs"
    cgroup(root / "slice" / "job", memory__max="max\n", memory__current="999\n")
    stat = "anon 1\ninactive_file 100\n"
    cgroup(root / "slice", memory__max=f"{64 * MIB}\n", memory__current="300\n", memory__stat=stat)
    (limit,) = cgroup_memory(root, tmp_path / "self")
    assert (limit.limit_bytes, limit.used_bytes) == (64 * MIB, 200)
    assert host_memory(root, tmp_path / "self") == (64 * MIB, 64 * MIB - 200)


def test_cgroup_1_unlimited_is_not_a_limit(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
    root = tmp_path / "fs"
    cgroup(root / "memory", memory__limit_in_bytes="9223372036854771712\n")
    assert cgroup_memory(root, tmp_path / "self") == []


def test_a_container_that_sees_its_hosts_path_has_its_limit_at_the_root(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("4:memory:/docker/abc\n")
    root = tmp_path / "fs"
    cgroup(root / "memory", memory__limit_in_bytes=str(GIB), memory__usage_in_bytes="7")
    assert [group.limit_bytes for group in cgroup_memory(root, tmp_path / "self")] == [GIB]


def test_a_machine_without_cgroups_has_the_hosts_memory(tmp_path: Path) -> None:
    assert host_memory(tmp_path, tmp_path / "absent")[0] == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("text", "wsl"),
    [("Linux version 6.6.87.2-microsoft-standard-WSL2 (gcc)", True), ("Linux version 6.8.0-60-generic", False)],
)
def test_wsl_is_known_by_its_kernel(tmp_path: Path, text: str, wsl: bool) -> None:
    (tmp_path / "version").write_text(text)
    assert is_wsl(tmp_path / "version") is wsl
    assert not is_wsl(tmp_path / "absent")


@pytest.mark.skipif(sys.platform != "linux", reason="names Linux")
def test_wsl_is_part_of_the_operating_systems_name(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("microsoft")
    assert operating_system(tmp_path / "version") == "Linux (WSL2)"
    assert operating_system(tmp_path / "absent") == "Linux"


def test_own_environment_has_the_installed_versions() -> None:
    found = read_environment(None, NVIDIA, threads=2)
    assert (found.driver, found.threads, found.peft) == ("580.1", 2, version("peft"))
    assert found.python == ".".join(str(part) for part in sys.version_info[:3])
    assert found == read_environment(sys.executable, NVIDIA, threads=2)
    assert read_environment(None, CPU).driver is None


def test_torchs_build_is_part_of_its_version() -> None:
    import torch

    assert read_environment(None, CPU).torch == torch.__version__
    build = torch_build()
    assert (build["cuda"], build["hip"]) == (torch.version.cuda, torch.version.hip)


def test_own_environment_is_read_in_under_50_ms_and_without_torch() -> None:
    code = """
import sys, time
from autotune.hardware.environment import read_environment
from autotune.values import Device
start = time.perf_counter()
read_environment(None, Device(kind="cpu", index=None, name="a CPU"))
print(time.perf_counter() - start, "torch" in sys.modules)
"""
    times = []
    for _ in range(3):  # the fastest: another program may be busy
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        seconds, torch_loaded = done.stdout.split()
        times.append(float(seconds))
        assert torch_loaded == "False"
    assert min(times) < 0.05


def test_another_pythons_versions_are_its_own(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    found = read_environment(str(tmp_path / "venv" / "bin" / "python"), CPU)
    assert (found.torch, found.peft) == (None, None)
    assert found.python == ".".join(str(part) for part in sys.version_info[:3])


def test_a_python_that_cannot_be_run_is_an_invalid_request(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be run"):
            read_environment(str(path), CPU)


def test_a_program_that_is_no_python_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="cannot be run"):
        read_environment("/bin/echo", CPU)


def test_a_question_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"no answer within 0\.2 s"):
        ask("versions", python=str(slow), timeout_s=0.2)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("output", ["", "hello", "[1]", '{"a": 1}\nbye'])
def test_what_is_no_json_object_is_no_answer(output: str) -> None:
    with pytest.raises(NoAnswer):
        parse_answer(output)
    assert parse_answer('a warning\n{"a": 1}\n') == {"a": 1}


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert installed_versions(["no-such-package", "click"]) == {"no-such-package": None, "click": version("click")}


def torch_answer(**device: object) -> dict[str, Any]:
    found = {"kind": "rocm", "index": 0, "name": "AMD Radeon RX 9070", "total_bytes": 16 * GIB, "free_bytes": 15 * GIB}
    found |= {"architecture": "gfx1201", "pci_domain_id": 0, "pci_bus_id": 3, "pci_device_id": 0, **device}
    return {"torch": "2.13.0+rocm7.2", "cuda": None, "hip": "7.2.4", "devices": [found], "problems": []}


class AmdSmi:
    """amdsmi as it answers for one card."""

    class AmdSmiException(Exception):
        """The root of amdsmi's errors."""

    bdf = "0000:03:00.0"

    def amdsmi_init(self) -> None: ...

    def amdsmi_shut_down(self) -> None: ...

    def amdsmi_get_processor_handles(self) -> list[int]:
        return [1]

    def amdsmi_get_gpu_driver_info(self, handle: int) -> dict[str, str]:
        return {"driver_name": "amdgpu", "driver_version": "6.12.12"}

    def amdsmi_get_gpu_device_bdf(self, handle: int) -> str:
        return self.bdf

    def amdsmi_get_gpu_process_list(self, handle: int) -> list[dict[str, Any]]:
        return [
            {"name": "train", "pid": 71, "memory_usage": {"vram_mem": 512 * MIB}},
            {"name": "N/A", "pid": 72, "mem": 7},
            {"name": "own", "pid": 73, "mem": 7},
        ]


def test_a_rocm_card_is_what_torch_and_amdsmi_say() -> None:
    reading = read_torch_devices(ask=Answering(torch=torch_answer()), amd=lambda: read_amdsmi(AmdSmi()), own_pids=[73])
    (card,) = reading.devices
    assert (card.kind, card.id, card.compute_capability) == ("rocm", "cuda:0", "gfx1201")
    assert (card.runtime, card.driver, card.free_bytes) == ("7.2.4", "6.12.12", 15 * GIB)
    assert [(one.pid, one.name, one.used_bytes) for one in card.tenants] == [(71, "train", 512 * MIB), (72, None, 7)]


def test_amdsmi_facts_of_another_card_are_left_alone() -> None:
    smi = AmdSmi()
    smi.bdf = "0000:43:00.0"
    answer = torch_answer()
    answer["devices"].append({**answer["devices"][0], "index": 1, "pci_bus_id": 0x43})
    first, second = read_torch_devices(ask=Answering(torch=answer), amd=lambda: read_amdsmi(smi), own_pids=[]).devices
    assert (first.driver, second.driver) == (None, "6.12.12")


def test_an_amdsmi_that_fails_costs_only_its_facts() -> None:
    class Failing(AmdSmi):
        def amdsmi_get_gpu_process_list(self, handle: int) -> list[dict[str, Any]]:
            raise self.AmdSmiException("no permission")

    (facts,) = read_amdsmi(Failing())
    assert (facts.driver, facts.tenants) == ("6.12.12", ())


def test_a_missing_amdsmi_library_raises_keyerror_which_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "amdsmi.py").write_text("raise KeyError('libamd_smi.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_amdsmi() == []


def test_an_xpu_is_read_and_a_cuda_card_left_to_nvml() -> None:
    answer = torch_answer(kind="xpu", name="Intel Arc B580", architecture=None, driver="1.6.33")
    answer["devices"].append({"kind": "cuda", "index": 0, "name": "NVIDIA L4"})
    (card,) = read_torch_devices(ask=Answering(torch=answer)).devices
    assert (card.id, card.name, card.driver, card.runtime) == ("xpu:0", "Intel Arc B580", "1.6.33", None)


def test_a_torch_that_gives_no_answer_is_a_problem_and_no_error() -> None:
    reading = read_torch_devices(ask=Answering(torch=NoAnswer("no answer within 60 s")))
    assert (reading.devices, len(reading.problems)) == ((), 1)


def test_torch_answers_for_this_machine() -> None:
    import torch

    facts = ask("torch", timeout_s=120)
    assert facts["torch"] == torch.__version__
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize(
    ("build", "kfd", "worth"),
    [
        ({}, True, False),
        ({"version": "2.13.0+cpu", "cuda": None, "hip": None, "xpu": None}, True, False),
        ({"version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "xpu": None}, True, False),
        ({"version": "2.13.0+rocm7.2", "cuda": None, "hip": "7.2", "xpu": None}, True, True),
        ({"version": "2.13.0+xpu", "cuda": None, "hip": None, "xpu": "2026"}, False, True),
    ],
)
def test_torch_is_started_only_where_it_could_see_another_card(
    tmp_path: Path, build: dict[str, str | None], kfd: bool, worth: bool
) -> None:
    node = tmp_path / "kfd"
    if kfd:
        node.touch()
    assert worth_asking(build, node) is worth


def test_the_machine_is_its_gpus_by_free_memory_and_then_its_cpu() -> None:
    full = Device(kind="cuda", index=1, name="NVIDIA L4", free_bytes=GIB)
    unreachable = Device(kind="cuda", index=None, name="NVIDIA A100", free_bytes=40 * GIB, mig="enabled")
    reading = NvmlReading(devices=(full, unreachable, NVIDIA))
    machine = read_machine(nvml=lambda _: reading, cpu=lambda: CPU)
    assert machine.devices == (NVIDIA, full, unreachable, CPU)
    assert machine.gpus == (NVIDIA, full, unreachable)


def test_nvidia_cards_are_out_of_reach_of_a_rocm_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.hardware.readers.worth_asking", lambda build: True)
    machine = read_machine(
        nvml=lambda _: NvmlReading(devices=(NVIDIA,)),
        torch=lambda _: TorchReading(devices=(RADEON,)),
        cpu=lambda: CPU,
    )
    assert [(device.name, device.index) for device in machine.gpus] == [("NVIDIA L4", None), (RADEON.name, 0)]


def test_no_driver_is_no_problem_and_a_broken_one_is() -> None:
    absent = NvmlReading(unavailable="NVML Shared Library Not Found", no_driver=True)
    broken = NvmlReading(unavailable="Driver Not Loaded")
    assert read_machine(nvml=lambda _: absent, cpu=lambda: CPU).problems == ()
    assert read_machine(nvml=lambda _: broken, cpu=lambda: CPU).problems == ("NVML: Driver Not Loaded",)


def test_the_reader_always_ends_with_the_cpu() -> None:
    assert MachineReader().devices()[-1].kind == "cpu"


def test_the_version_script_runs_alone(tmp_path: Path) -> None:
    script = Path(sys.modules[ask.__module__].__file__ or "").with_name("ask_versions.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script), "click"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout)["versions"] == {"click": version("click")}
