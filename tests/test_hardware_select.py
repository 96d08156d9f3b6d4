"""Which device is meant, what is kept free of it, and how sizes are written."""

from __future__ import annotations

import pytest

from autotune.errors import GpuUnavailable, InvalidRequest, UsageError
from autotune.hardware.select import check_memory_limit, default_headroom_bytes, select_device
from autotune.hardware.sizes import format_bytes, parse_bytes
from autotune.values import GIB, MIB, Device

CPU = Device(kind="cpu", index=None, name="AMD EPYC", total_bytes=16 * GIB, free_bytes=15 * GIB)


def gpu(index: int | None, name: str, total: float = 12, free: float | None = None, **more: object) -> Device:
    return Device(
        kind="cuda",
        index=index,
        name=name,
        uuid=f"GPU-{index}{index}{index}{index}-{name[-4:]}",
        total_bytes=round(total * GIB),
        free_bytes=round((total if free is None else free) * GIB),
        **more,  # type: ignore[arg-type]
    )


RTX_3060 = gpu(0, "NVIDIA GeForce RTX 3060", 12, 11)
RTX_3060_8 = gpu(1, "NVIDIA GeForce RTX 3060", 8, 8)
RTX_3060_TI = gpu(2, "NVIDIA GeForce RTX 3060 Ti", 8, 8)
LAPTOP = gpu(3, "NVIDIA GeForce RTX 3060 Laptop GPU", 6, 6)
RTX_4090 = gpu(4, "NVIDIA GeForce RTX 4090", 24, 9)
A100_40 = gpu(5, "NVIDIA A100-SXM4-40GB", 40, 40)
A100_80 = gpu(6, "NVIDIA A100 80GB PCIe", 80, 1)
QUADRO = gpu(7, "Quadro RTX 6000", 24, 24)
ADA = gpu(8, "NVIDIA RTX 6000 Ada Generation", 48, 48)
ALL = (RTX_3060, RTX_3060_8, RTX_3060_TI, LAPTOP, RTX_4090, A100_40, A100_80, QUADRO, ADA, CPU)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("cuda:4", RTX_4090),
        ("CUDA:4", RTX_4090),
        ("cuda", RTX_3060),
        ("cpu", CPU),
        ("GPU-4444-4090", RTX_4090),
        ("gpu-4444", RTX_4090),
        ("4090", RTX_4090),
        ("rtx 4090", RTX_4090),
        ("NVIDIA GeForce RTX 4090", RTX_4090),
        ("RTX4090", RTX_4090),
        ("3060", RTX_3060),
        ("RTX 3060 8GB", RTX_3060_8),
        ("rtx 3060 12 GiB", RTX_3060),
        ("3060 Ti", RTX_3060_TI),
        ("RTX3060Ti", RTX_3060_TI),
        ("3060 laptop", LAPTOP),
        ("A100", A100_80),
        ("a100 40gb", A100_40),
        ("quadro rtx 6000", QUADRO),
        ("6000 ada", ADA),
    ],
)
def test_a_device_is_found_by_what_people_call_it(wanted: str, chosen: Device) -> None:
    assert select_device(wanted, ALL)[0] == chosen


@pytest.mark.parametrize(
    ("wanted", "devices", "words"),
    [
        ("cuda:9", (RTX_3060, CPU), ("cuda:9 is not in this machine", "cuda:0", "RTX 3060")),
        ("cuda:-1", (RTX_3060, CPU), ("cuda:-1 is not",)),
        ("cuda:x", (RTX_3060, CPU), ("cuda:x is not",)),
        ("xpu:0", (RTX_3060, CPU), ("xpu:0 is not",)),
        ("cuda:0", (CPU,), ("no GPU is visible here", "--gpu cpu")),
        ("GPU-nope", (RTX_3060, CPU), ("GPU-nope is not in this machine",)),
        ("GPU-", (RTX_3060, RTX_4090), ("begins 2 UUIDs", "RTX 4090")),
        ("RTX 5090", (RTX_3060, CPU), ('"RTX 5090" is not in this machine', "`autotune gpus`")),
        ("306", (RTX_3060, CPU), ('"306" is not in this machine',)),
        ("", (RTX_3060, CPU), ("is not in this machine",)),
        ("RTX", (RTX_3060, RTX_4090), ("could be any of", "RTX 3060", "RTX 4090", "12.0 GiB")),
        ("RTX 6000", (QUADRO, ADA), ("could be any of", "Quadro", "Ada")),
        ("3060", (RTX_3060_TI, LAPTOP), ("without suffix", "3060 Ti", "Laptop")),
    ],
)
def test_what_is_not_here_exits_4_and_says_what_is(wanted: str, devices: tuple[Device, ...], words: list[str]) -> None:
    with pytest.raises(GpuUnavailable) as caught:
        select_device(wanted, devices)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_auto_takes_the_gpu_with_most_free_memory_and_says_so() -> None:
    chosen, sentence = select_device("auto", (RTX_4090, RTX_3060, CPU))
    assert chosen == RTX_3060
    assert sentence == (
        "Using cuda:0 NVIDIA GeForce RTX 3060 (11.0 GiB of 12.0 GiB free), the one of 2 GPUs with most free memory."
    )


def test_auto_without_a_gpu_rehearses_on_the_cpu_and_says_so() -> None:
    chosen, sentence = select_device("auto", (CPU,))
    assert chosen == CPU
    assert sentence is not None
    assert "No GPU is visible here" in sentence
    assert "rehearsal" in sentence


def test_auto_says_when_a_gpu_is_here_that_cuda_does_not_enumerate() -> None:
    parent = gpu(None, "NVIDIA A100-SXM4-40GB", 40, mig="enabled")
    chosen, sentence = select_device("auto", (parent, CPU))
    assert chosen == CPU
    assert "CUDA enumerates none" in (sentence or "")


def test_the_choice_among_equal_cards_is_the_emptier_and_is_said() -> None:
    busy, idle = gpu(0, "NVIDIA L4", 24, 2), gpu(1, "NVIDIA L4", 24, 23)
    chosen, sentence = select_device("L4", (busy, idle))
    assert chosen == idle
    assert "cuda:1" in (sentence or "")


def test_a_slice_that_cuda_does_not_enumerate_says_how_to_reach_it() -> None:
    parent = gpu(None, "NVIDIA A100-SXM4-40GB", 40, mig="enabled")
    piece = gpu(None, "NVIDIA A100-SXM4-40GB", 20, mig="3g.20gb")
    with pytest.raises(GpuUnavailable, match="CUDA_VISIBLE_DEVICES=GPU-"):
        select_device("A100 3g.20gb", (parent, piece, CPU))
    with pytest.raises(GpuUnavailable, match="MIG mode"):
        select_device("A100", (parent, CPU))


def test_a_slice_is_found_before_its_card() -> None:
    parent = gpu(None, "NVIDIA A100-SXM4-40GB", 40, mig="enabled")
    piece = gpu(0, "NVIDIA A100-SXM4-40GB", 20, mig="3g.20gb")
    assert select_device("a100", (parent, piece, CPU))[0] == piece


def test_a_rocm_card_is_called_cuda_as_torch_calls_it() -> None:
    radeon = Device(kind="rocm", index=0, name="AMD Radeon RX 9070", total_bytes=16 * GIB)
    assert select_device("cuda:0", (radeon, CPU))[0] == radeon
    assert select_device("rx 9070", (radeon, CPU))[0] == radeon


@pytest.mark.parametrize(
    ("device", "headroom"),
    [(CPU, 0), (LAPTOP, 256 * MIB), (A100_80, 80 * GIB // 50), (Device(kind="cuda", index=0, name="?"), 256 * MIB)],
)
def test_headroom_is_2_percent_of_a_card_and_at_least_256_mib(device: Device, headroom: int) -> None:
    assert default_headroom_bytes(device) == headroom


def test_headroom_is_of_the_limit_where_a_card_is_treated_as_a_smaller_one() -> None:
    assert default_headroom_bytes(A100_80, 20 * GIB) == 20 * GIB // 50
    assert default_headroom_bytes(A100_80, 8 * GIB) == 256 * MIB
    assert default_headroom_bytes(CPU, GIB) == 0


@pytest.mark.parametrize("limit", [64 * MIB, 12 * GIB])
def test_a_memory_limit_up_to_the_card_is_accepted(limit: int) -> None:
    check_memory_limit(limit, RTX_3060)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (99 * 2**40, ("99.0 TiB", "12.0 GiB")),
        (12 * GIB + 1, ("12.0 GiB",)),
        (1024, ("1.0 KiB", "64.0 MiB")),
        (0, ("0 Bytes", "64.0 MiB")),
    ],
)
def test_a_memory_limit_that_cannot_be_names_both_numbers(limit: int, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_memory_limit(limit, RTX_3060)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * GIB),
        ("12 gib", 12 * GIB),
        ("12G", 12 * GIB),
        (" 12 GB ", 12 * 10**9),
        ("1.5GiB", 1536 * MIB),
        ("1500MiB", 1500 * MIB),
        ("500M", 500 * MIB),
        ("1KiB", 1024),
        ("99TiB", 99 * 2**40),
        ("1073741824", GIB),
        ("1073741824 B", GIB),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["twelve", "0", "0GiB", "-1", "-1GiB", "", "1.5", "12GiBs", "inf", "nan GiB", "1e9", "0.1B"]
)
def test_what_is_no_size_says_which_forms_are(text: str) -> None:
    with pytest.raises(InvalidRequest, match="12GiB") as caught:
        parse_bytes(text)
    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("size", "text"), [(None, "unknown"), (0, "0 Bytes"), (12 * GIB, "12.0 GiB")])
def test_sizes_are_shown_in_binary_units(size: int | None, text: str) -> None:
    assert format_bytes(size) == text
