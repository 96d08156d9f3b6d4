"""Faults that a trainer does to itself: each strikes once at its step, however often the step is trained."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.fault_ledger import Ledger

FAULTS_VARIABLE = "AUTOTUNE_BENCHMARK_FAULTS"  # path of a `Spec` as JSON
LAUNCH_VARIABLE = "AUTOTUNE_BENCHMARK_LAUNCH"  # which start of a supervisor, by the harness, an attempt is under
MIB = 1 << 20


class Fault(StrEnum):
    """What goes wrong."""

    OOM_LOAD = "out of memory at load"
    OOM_FIRST_STEP = "out of memory at the first step"
    OOM_MID_EPOCH = "out of memory mid-epoch"
    OOM_EVALUATION = "out of memory in evaluation"
    OOM_SAVE = "out of memory while saving"
    HOST_OOM = "out of shared memory in a data-loader worker"
    WORKER_KILLED = "data-loader worker killed"
    KILL_TRAINER = "kill -9 of the trainer"
    KILL_IN_SAVE = "kill -9 in the middle of a save"
    TRUNCATED = "truncated newest checkpoint"
    INCOMPLETE = "incomplete newest checkpoint"
    GARBAGE = "newest checkpoint with broken JSON"
    DISK_FULL = "full disk"
    HANG = "hung trainer, deaf to SIGTERM"
    BUG = "a bug in the training script"
    CLOCK_JUMP = "clock jump"
    KILL_SUPERVISOR = "kill -9 of the supervisor"
    KILL_BOTH = "kill -9 of supervisor and trainer"
    KILL_DAEMON = "kill -9 of the daemon"
    KILL_ALL = "kill -9 of daemon, supervisor and trainer"
    DOUBLE_SIGNAL = "two signals to the supervisor"


MEMORY = frozenset({Fault.OOM_FIRST_STEP, Fault.OOM_MID_EPOCH})  # another training config is called for
BY_LAW = MEMORY | {Fault.OOM_EVALUATION}  # the memory law brings them about, whenever a config needs too much
FROM_OUTSIDE = frozenset(
    {Fault.KILL_SUPERVISOR, Fault.KILL_BOTH, Fault.KILL_DAEMON, Fault.KILL_ALL, Fault.DOUBLE_SIGNAL}
)


@dataclass(frozen=True)
class Strike:
    """One fault, and the optimizer step at or after which it strikes."""

    fault: Fault
    step: int = 0


@dataclass(frozen=True)
class Law:
    """Bytes that a micro batch needs: fixed + per_token × samples × tokens of the longest, less with checkpointing."""

    fixed_bytes: int = 8 * MIB
    token_bytes: int = 4096
    capacity_bytes: int | None = None  # of an imagined card; None: whatever the operating system gives
    checkpointing: float = 0.4  # of token_bytes

    def need(self, samples: int, tokens: int, *, checkpointing: bool = False) -> int:
        part = self.checkpointing if checkpointing else 1.0
        return self.fixed_bytes + int(self.token_bytes * part) * samples * tokens


@dataclass(frozen=True)
class Spec:
    """What a trainer is to do wrong, and the task that it trains."""

    folder: str  # of the ledger, and of the marks of what has struck
    strikes: tuple[Strike, ...] = ()
    law: Law = field(default_factory=Law)
    samples: int = 64
    seed: int = 0
    tokens: int = 64  # of a usual sample
    long_tokens: int = 64
    long_step: int = 0  # the optimizer step with a long sample; 0: none is long
    long_sample: int | None = None  # its id, where the order is a real Trainer's
    eval_tokens: int = 64
    step_s: float = 0.01
    legacy: bool = False  # transformers before 5.2: the micro batch of a resumed run is the checkpoint's
    clock_file: str | None = None  # holds the seconds by which the clock is wrong
    clock_before: int = 0  # seconds in it at first
    clock_after: int = 0  # … and from the clock jump on

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_spec(path: Path) -> Spec:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    strikes = tuple(Strike(Fault(one["fault"]), one["step"]) for one in document.pop("strikes"))
    return Spec(**{**document, "strikes": strikes, "law": Law(**document["law"])})


class CudaOutOfMemory(RuntimeError):
    """Printed as torch's own where it is not caught."""


CudaOutOfMemory.__module__, CudaOutOfMemory.__qualname__ = "torch", "OutOfMemoryError"


def cuda_text(asked: int, used: int, capacity: int) -> str:
    """torch 2.13's words."""
    free = max(0, capacity - used)
    return (
        f"CUDA out of memory. Tried to allocate {asked / MIB:.2f} MiB. GPU 0 has a total capacity of"
        f" {capacity / MIB:.2f} MiB of which {free / MIB:.2f} MiB is free. Including non-PyTorch memory, this process"
        f" has {used / MIB:.2f} MiB memory in use. Of the allocated memory {used / MIB:.2f} MiB is allocated by"
        " PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If reserved but unallocated memory is large"
        " try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    )


def cpu_text(asked: int) -> str:
    """torch 2.13's words."""
    return (
        "[enforce fail at alloc_cpu.cpp:131] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        f" allocate {asked} bytes. Error code 12 (Cannot allocate memory)"
    )


class Injector:
    """Asked by a trainer at each place where something may go wrong."""

    def __init__(self, spec: Spec, ledger: Ledger) -> None:
        self.spec, self.ledger = spec, ledger

    def strikes(self, fault: Fault, step: int = 0) -> bool:
        """Whether `fault` strikes now, which it does once. It is in the ledger before anything else happens."""
        for number, strike in enumerate(self.spec.strikes):
            if strike.fault is fault and step >= strike.step and self._mark(number):
                self.ledger.write("fault", fault=fault, step=step)
                return True
        return False

    def _mark(self, number: int) -> bool:
        try:
            os.close(os.open(Path(self.spec.folder, f"struck-{number}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def out_of_memory(self, fault: Fault, asked: int, used: int, step: int) -> RuntimeError:
        """The exception of a lack of memory that came about by itself, noted in the ledger."""
        self.ledger.write("fault", fault=fault, step=step)
        capacity = self.spec.law.capacity_bytes
        return RuntimeError(cpu_text(asked)) if capacity is None else CudaOutOfMemory(cuda_text(asked, used, capacity))

    def at_load(self) -> None:
        if self.strikes(Fault.OOM_LOAD, self.ledger.attempt):  # its step is the attempt that it strikes
            raise CudaOutOfMemory(cuda_text(64 * MIB, 90 * MIB, 96 * MIB))

    def before_step(self, step: int, workers: int) -> None:
        """`step` is the one about to be trained."""
        if self.strikes(Fault.KILL_TRAINER, step):
            kill_myself()
        if self.strikes(Fault.HANG, step):
            hang()
        if self.strikes(Fault.BUG, step):
            raise ValueError("expected target size [4, 64], got [4, 63]")
        if self.spec.clock_file and self.strikes(Fault.CLOCK_JUMP, step):
            Path(self.spec.clock_file).write_text(str(self.spec.clock_after), encoding="ascii")
        worker = f"DataLoader worker (pid {os.getpid() + 1}) is killed by signal"
        if workers and self.strikes(Fault.HOST_OOM, step):
            raise RuntimeError(
                f"{worker}: Bus error. It is possible that dataloader's workers are out of shared memory. Please try to"
                " raise your shared memory limit."
            )
        if workers and self.strikes(Fault.WORKER_KILLED, step):
            raise RuntimeError(f"{worker}: Killed. ")

    def in_save(self, folder: Path, step: int) -> None:
        """Between the first and the last file of a checkpoint."""
        if self.strikes(Fault.OOM_SAVE, step):
            raise CudaOutOfMemory(cuda_text(24 * MIB, 90 * MIB, 96 * MIB))
        if self.strikes(Fault.DISK_FULL, step):
            (folder / "optimizer.pt").unlink(missing_ok=True)
            (folder / "optimizer.pt").symlink_to("/dev/full")  # the kernel answers every write with ENOSPC
        if self.strikes(Fault.KILL_IN_SAVE, step):
            kill_myself()

    def after_save(self, folder: Path, step: int) -> None:
        """Damage the checkpoint just written, and die: only an older one is left to resume from."""
        for fault, damage in (
            (Fault.TRUNCATED, truncate),
            (Fault.INCOMPLETE, remove),
            (Fault.GARBAGE, break_json),
        ):
            if self.strikes(fault, step):
                damage(folder, step)
                self.ledger.write("damaged", step=step, path=str(folder))
                kill_myself()


def truncate(folder: Path, step: int) -> None:
    path = folder / ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt")[step % 4]
    os.truncate(path, path.stat().st_size // 2)


def remove(folder: Path, step: int) -> None:
    if step % 3 == 0:
        (folder / "checkpoint-is-incomplete.txt").write_text("", encoding="ascii")  # as transformers' JIT saving does
    else:
        (folder / ("optimizer.pt", "adapter_model.safetensors")[step % 3 - 1]).unlink()


def break_json(folder: Path, step: int) -> None:
    path = folder / "trainer_state.json"
    broken: Sequence[str] = ("", '{"global_step": ', "\0" * 64, "[]")
    path.write_text(broken[step % len(broken)], encoding="utf-8")


def kill_myself() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive after SIGKILL")


def hang() -> NoReturn:
    """For ever, as a trainer does that waits for a lock or a rank."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(60)
