"""Sizes in a message become bytes."""

from __future__ import annotations

import pytest

from autotune.values import GIB, MIB
from autotune.verdict.numbers import parse_bytes, read_numbers

KIB = 1024

CASES = [
    (
        "CUDA out of memory. Tried to allocate 10.01 GiB (GPU 0; 14.75 GiB total capacity; 10.12 GiB already allocated;"
        " 4.39 GiB free; 10.22 GiB reserved in total by PyTorch)",
        {
            "tried_bytes": 10.01 * GIB,
            "total_bytes": 14.75 * GIB,
            "allocated_bytes": 10.12 * GIB,
            "free_bytes": 4.39 * GIB,
            "reserved_bytes": 10.22 * GIB,
        },
    ),
    (  # torch 1.1-1.3: "cached" is what is held and not in use
        "CUDA out of memory. Tried to allocate 1.12 MiB (GPU 0; 22.37 GiB total capacity; 15.87 GiB already allocated;"
        " 3.56 MiB free; 787.74 MiB cached)",
        {
            "tried_bytes": 1.12 * MIB,
            "total_bytes": 22.37 * GIB,
            "allocated_bytes": 15.87 * GIB,
            "free_bytes": 3.56 * MIB,
            "reserved_unallocated_bytes": 787.74 * MIB,
            "reserved_bytes": 15.87 * GIB + 787.74 * MIB,
        },
    ),
    (
        "Tried to allocate 2.22 GiB. GPU 0 has a total capacity of 79.15 GiB of which 228.38 MiB is free. Including"
        " non-PyTorch memory, this process\nhas 78.93 GiB memory in use. Of the allocated memory 76.28 GiB is allocated"
        " by PyTorch, and 2.14 GiB is reserved by PyTorch but unallocated.",
        {
            "tried_bytes": 2.22 * GIB,
            "total_bytes": 79.15 * GIB,
            "free_bytes": 228.38 * MIB,
            "process_bytes": 78.93 * GIB,
            "allocated_bytes": 76.28 * GIB,
            "reserved_unallocated_bytes": 2.14 * GIB,
            "reserved_bytes": 76.28 * GIB + 2.14 * GIB,
        },
    ),
    (
        "total capacty of 14.75 GiB of which 0 bytes is free. Process 20398 has 14.52 GiB memory in use. 11.87 GiB"
        " allowed; Of the allocated memory",
        {
            "total_bytes": 14.75 * GIB,
            "free_bytes": 0,
            "process_bytes": 14.52 * GIB,
            "allowed_bytes": 11.87 * GIB,
        },
    ),
    (
        "cuda out of memory. tried to allocate 30.00 mib (gpu 0; 8.00 gib total capacity; 0 bytes free;",
        {"tried_bytes": 30 * MIB, "total_bytes": 8 * GIB, "free_bytes": 0},
    ),
    (
        "MPS backend out of memory (MPS allocated: 9.57 GiB, other allocations: 17.35 GiB, max allowed: 27.20 GiB)."
        " Tried to allocate 292.50 MiB on private pool.",
        {"allocated_bytes": 9.57 * GIB, "allowed_bytes": 27.2 * GIB, "tried_bytes": 292.5 * MIB},
    ),
    (
        "Allocation on device 0 would exceed allowed memory. (out of memory)\nCurrently allocated     : 6.75 GiB\n"
        "Requested               : 80.00 MiB\nDevice limit            : 8.00 GiB\nFree (according to CUDA): 0 bytes\n"
        "PyTorch limit (set by user-supplied memory fraction)\n                        : 17179869184.00 GiB",
        {"allocated_bytes": 6.75 * GIB, "tried_bytes": 80 * MIB, "total_bytes": 8 * GIB, "free_bytes": 0},
    ),
    ("DefaultCPUAllocator: not enough memory: you tried to allocate 1981808640 bytes.", {"tried_bytes": 1981808640}),
    ("failed to allocate 17.79G (19104890880 bytes) from device", {"tried_bytes": 19104890880}),
    ("Out of memory while trying to allocate 8589934592 bytes.", {"tried_bytes": 8589934592}),
    ("Unable to allocate 1.61 GiB for an array with shape", {"tried_bytes": 1.61 * GIB}),
    ("Invalid buffer size: 635.13 GB", {"tried_bytes": 635.13 * GIB}),
    ("allocating 14136.04 MiB on device 0: cudaMalloc failed", {"tried_bytes": 14136.04 * MIB}),
    ("failed to allocate ROCm0 buffer of size 14822711296", {"tried_bytes": 14822711296}),
    (
        "Out of memory allocating 2,147,483,648 bytes (allocated so far: 512 bytes).",
        {"tried_bytes": 2 * GIB, "allocated_bytes": 512},
    ),
    ("Tried to allocate more than 1EB memory", {"tried_bytes": 2**60}),
    (
        "Cannot allocate 100.000000MB memory on GPU 0, 15.5GB memory has been allocated and available memory is only"
        " 82.0MB.",
        {"tried_bytes": 100 * MIB, "allocated_bytes": 15.5 * GIB, "free_bytes": 82 * MIB},
    ),
    (
        "Free memory on device (3.91/15.77 GiB) on startup is less than",
        {"free_bytes": 3.91 * GIB, "total_bytes": 15.77 * GIB},
    ),
    ("unable to mmap 280 bytes from file", {"tried_bytes": 280}),
    ("loss 2.31, 4096 tokens, 12.5 GB disk", {}),
]


@pytest.mark.parametrize(("text", "wanted"), CASES)
def test_a_message_gives_its_bytes(text: str, wanted: dict[str, float]) -> None:
    found = read_numbers(text)
    assert set(found) == set(wanted)
    assert all(isinstance(value, int) for value in found.values())
    assert found == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize(
    ("number", "unit", "wanted"),
    [
        ("1", "bytes", 1),
        ("2", "KiB", 2 * KIB),
        ("1.5", "MB", 3 * MIB // 2),
        ("2", "G", 2 * GIB),
        ("1", "EB", 2**60),
        ("2,048", "", 2048),
        ("19104890880", "bytes", 19104890880),
    ],
)
def test_units_are_powers_of_1024(number: str, unit: str, wanted: int) -> None:
    assert parse_bytes(number, unit) == wanted
