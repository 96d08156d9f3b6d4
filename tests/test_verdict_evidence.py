"""The system's own records are read where they are, and missing ones are None."""

from __future__ import annotations

import time
from pathlib import Path

from autotune.verdict.evidence import Evidence, oom_kills_between, read_evidence

KILL = "Out of memory: Killed process 4321 (python) total-vm:92837428kB, anon-rss:63214800kB"
CGROUP_KILL = "oom-kill:constraint=CONSTRAINT_MEMCG,task_memcg=/docker/ab,task=python3,pid=4321,uid=0"
OTHER = "Memory cgroup out of memory: Killed process 77 (chrome) total-vm:1kB"
XID = "NVRM: Xid (PCI:0000:01:00): 79, pid=4321, name=python, GPU has fallen off the bus."
NOTHING = Path("/nonexistent")


def kernel_log(folder: Path, *lines: tuple[float, str]) -> Path:
    """A file in /dev/kmsg's format, at seconds since boot."""
    path = folder / "kmsg"
    path.write_text("".join(f"3,{number},{int(at * 1e6)},-;{text}\n" for number, (at, text) in enumerate(lines)))
    return path


def version_2(folder: Path, group: str = "user.slice/job", kills: int = 2) -> tuple[Path, Path]:
    here = folder / "cgroup" / group
    here.mkdir(parents=True)
    (here / "memory.events").write_text(f"low 0\nhigh 3\nmax 41\noom 5\noom_kill {kills}\n")
    (here / "memory.max").write_text("68719476736\n")
    (here / "memory.current").write_text("1048576\n")
    (folder / "self").write_text(f"0::/{group}\n")
    return folder / "cgroup", folder / "self"


def test_counters_of_cgroup_version_2(tmp_path: Path) -> None:
    root, membership = version_2(tmp_path)
    evidence = read_evidence(cgroup_root=root, membership=membership, kmsg=NOTHING, dmesg=None)
    assert evidence == Evidence(
        oom_kills=2, oom_events=5, limit_hits=41, memory_max_bytes=64 * 2**30, memory_current_bytes=2**20
    )


def test_a_container_sees_its_cgroup_as_the_root(tmp_path: Path) -> None:
    root, membership = version_2(tmp_path, group="")
    membership.write_text("0::/docker/abc/deeper\n")
    assert read_evidence(cgroup_root=root, membership=membership, kmsg=NOTHING, dmesg=None).oom_kills == 2


def test_no_limit_is_unknown_not_a_number(tmp_path: Path) -> None:
    root, membership = version_2(tmp_path)
    (root / "user.slice" / "job" / "memory.max").write_text("max\n")
    assert read_evidence(cgroup_root=root, membership=membership, kmsg=NOTHING, dmesg=None).memory_max_bytes is None


def test_counters_of_cgroup_version_1(tmp_path: Path) -> None:
    here = tmp_path / "memory" / "job_7"
    here.mkdir(parents=True)
    (here / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (here / "memory.failcnt").write_text("19\n")
    (here / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (here / "memory.usage_in_bytes").write_text("4096\n")
    (tmp_path / "self").write_text("5:cpu,cpuacct:/job_7\n4:memory:/job_7\n0::/\n")
    evidence = read_evidence(cgroup_root=tmp_path, membership=tmp_path / "self", kmsg=NOTHING, dmesg=None)
    assert (evidence.oom_kills, evidence.limit_hits, evidence.memory_max_bytes) == (3, 19, None)
    assert evidence.memory_current_bytes == 4096


def test_the_kernel_log_is_read_for_our_pids(tmp_path: Path) -> None:
    log = kernel_log(tmp_path, (5, "usb 1-1: new device"), (9, CGROUP_KILL), (9.1, KILL), (9.2, OTHER), (9.3, XID))
    evidence = read_evidence([4321], cgroup_root=NOTHING, membership=NOTHING, kmsg=log, dmesg=None)
    assert evidence.kernel_lines == (CGROUP_KILL, KILL)
    assert evidence.other_kills == 1
    assert evidence.device_lines == (XID,)
    assert evidence.oom_kills is None


def test_lines_from_before_the_run_are_left_out(tmp_path: Path) -> None:
    boot = time.monotonic()
    log = kernel_log(tmp_path, (max(0.0, boot - 300), OTHER), (boot, KILL))
    evidence = read_evidence(since=time.time() - 20, cgroup_root=NOTHING, membership=NOTHING, kmsg=log, dmesg=None)
    assert evidence.kernel_lines == (KILL,)  # with no pids known, a kill during the run is ours
    assert evidence.other_kills == 0


def test_dmesg_stands_in_for_an_unreadable_log() -> None:
    command = ("printf", f"[   12.345678] {KILL}\\n<6>[13.5] {OTHER}\\nno time\\n")
    evidence = read_evidence([4321], cgroup_root=NOTHING, membership=NOTHING, kmsg=NOTHING, dmesg=command)
    assert evidence.kernel_lines == (KILL,)
    assert evidence.other_kills == 1


def test_what_cannot_be_read_is_none() -> None:
    for command in (None, ("false",), ("/nonexistent/dmesg",)):
        evidence = read_evidence([1], cgroup_root=NOTHING, membership=NOTHING, kmsg=NOTHING, dmesg=command)
        assert evidence == Evidence()


def test_a_slow_dmesg_is_given_up() -> None:
    began = time.monotonic()
    evidence = read_evidence(cgroup_root=NOTHING, membership=NOTHING, kmsg=NOTHING, dmesg=("sleep", "30"))
    assert evidence.kernel_lines is None
    assert time.monotonic() - began < 10


def test_this_machine_can_be_asked_without_an_error() -> None:
    assert isinstance(read_evidence([1], time.time()), Evidence)


def test_kills_are_counted_between_two_readings() -> None:
    assert oom_kills_between(Evidence(oom_kills=1), Evidence(oom_kills=3)) == 2
    assert oom_kills_between(Evidence(oom_kills=3), Evidence(oom_kills=0)) == 0
    assert oom_kills_between(Evidence(), Evidence(oom_kills=3)) is None
    assert oom_kills_between(None, Evidence(oom_kills=3)) is None
