"""One attempt, with real small commands: what they print, how they end, and who ends those that do not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tty
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import AutotuneError
from autotune.recover import stop as stop_module
from autotune.recover.facts import EndedBy, Phase
from autotune.recover.output import Output
from autotune.values import GIB, MIB, Device, Tenant
from tests.attempts import QUICK, Attempt, living, python, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs are supervised on Linux and WSL2")


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


@pytest.mark.parametrize(
    ("script", "exit_code", "number"),
    [
        ("exit 0", 0, None),
        ("exit 7", 7, None),
        ("exit 255", 255, None),
        ("kill -KILL $$", -9, 9),
        ("kill -SEGV $$", -11, 11),
        ("kill -TERM $$", -15, 15),
    ],
)
def test_exit_codes_and_signals_are_told(attempt: Attempt, script: str, exit_code: int, number: int | None) -> None:
    ended = attempt.run(("sh", "-c", script))
    assert (ended.exit_code, ended.signal, ended.ended_by) == (exit_code, number, EndedBy.ITSELF)


@pytest.mark.parametrize(
    ("argv", "exit_code", "word"),
    [
        (("no-such-command-here",), 127, "command not found"),
        (("./no/such/file",), 127, "command not found"),
        (("/etc/passwd",), 126, "cannot be executed"),
        (("/",), 126, "cannot be executed"),
        (("bad\0word",), 125, "could not be started"),
    ],
)
def test_a_command_that_cannot_start_is_an_error_as_a_shell_has_it(
    attempt: Attempt, argv: tuple[str, ...], exit_code: int, word: str
) -> None:
    with pytest.raises(AutotuneError, match=word) as caught:
        attempt.run(argv)
    assert caught.value.exit_code == exit_code


def test_a_missing_interpreter_is_named_as_such(attempt: Attempt) -> None:
    script = attempt.folder / "train"
    script.write_text("#!/no/such/python\n")
    script.chmod(0o755)
    with pytest.raises(AutotuneError, match="names an interpreter") as caught:
        attempt.run((str(script),))
    assert caught.value.exit_code == 126


def test_a_script_without_a_first_line_is_named_as_such(attempt: Attempt) -> None:
    script = attempt.folder / "train"
    script.write_text("echo hi\n")
    script.chmod(0o755)
    with pytest.raises(AutotuneError, match="add one such as #!/bin/sh") as caught:
        attempt.run((str(script),))
    assert caught.value.exit_code == 126


def test_a_missing_working_folder_is_our_failure(attempt: Attempt) -> None:
    attempt.cwd = attempt.folder / "gone"
    with pytest.raises(AutotuneError, match=r"could not be started in .*gone") as caught:
        attempt.run(python("pass"))
    assert caught.value.exit_code == 125


def test_a_broken_keeper_is_our_failure(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = attempt.folder / "keeper.py"
    broken.write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr("autotune.recover.start._KEEPER", broken)
    with pytest.raises(AutotuneError, match="no such luck") as caught:
        attempt.run(python("pass"))
    assert caught.value.exit_code == 125


# -------------------------------------------------------------------------------- output


def test_output_is_passed_on_byte_for_byte(attempt: Attempt) -> None:
    script = """
        import random
        random.seed(0)
        data = random.randbytes(5 * 2**20 + 3)
        def write(descriptor, data):
            while data:
                data = data[os.write(descriptor, data[:50_000]):]
        for start in range(0, len(data), 100_000):
            write(1, data[start:start + 100_000])
            write(2, data[start:start + 100_000][::-1])
    """
    ended = attempt.run(python(script))
    random.seed(0)
    data = random.randbytes(5 * 2**20 + 3)
    backwards = b"".join(data[start : start + 100_000][::-1] for start in range(0, len(data), 100_000))
    assert ended.exit_code == 0
    assert _digest(attempt.stdout.read_bytes()) == _digest(data)
    assert _digest(attempt.stderr.read_bytes()) == _digest(backwards)
    assert attempt.log.stat().st_size == 2 * len(data)
    assert len(ended.tail) > 60_000


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_both_streams_are_kept_in_one_log_in_order(attempt: Attempt) -> None:
    script = """
        for number in range(20):
            os.write(1 + number % 2, b"%d " % number)
            time.sleep(0.02)
    """
    ended = attempt.run(python(script))
    assert attempt.log.read_bytes() == b"".join(b"%d " % number for number in range(20))
    assert ended.tail == attempt.log.read_text()


def test_a_later_attempt_has_its_own_tail_and_the_same_log(attempt: Attempt) -> None:
    attempt.run(("echo", "one"))
    assert attempt.run(("echo", "two")).tail == "two\n"
    assert attempt.log.read_text() == "one\ntwo\n"


def test_the_log_is_private_and_rotated(attempt: Attempt) -> None:
    script = "for number in range(2000): os.write(1, b'%04d' % number + b'.' * 996)"
    attempt.run(python(script), max_bytes=100_000, files=3)
    names = sorted(path.name for path in attempt.folder.glob("output.log*"))
    assert names == ["output.log", "output.log.1", "output.log.2"]
    assert all(path.stat().st_size <= 100_000 for path in attempt.folder.glob("output.log*"))
    assert attempt.log.stat().st_mode & 0o777 == 0o600
    assert attempt.log.read_bytes().endswith(b"." * 96)


def test_a_reader_that_has_gone_does_not_stop_the_run(attempt: Attempt) -> None:
    read, write = os.pipe()
    os.close(read)
    output = Output(attempt.log, stdout=write, stderr=write)
    os.close(write)
    with contextlib.closing(output):
        ended = attempt.run_with(output, python("for _ in range(300): os.write(1, b'x' * 10_000)"))
    assert ended.exit_code == 0
    assert attempt.log.stat().st_size == 3_000_000


def test_a_slow_reader_gets_every_byte(attempt: Attempt) -> None:
    read, write = os.pipe()
    got: list[bytes] = []

    def slowly() -> None:
        while data := os.read(read, 300_000):
            got.append(data)
            time.sleep(0.005)

    reader = threading.Thread(target=slowly)
    reader.start()
    output = Output(attempt.log, stdout=write)
    os.close(write)
    with contextlib.closing(output):
        ended = attempt.run_with(output, python("for _ in range(500): os.write(1, b'x' * 10_000)"))
    reader.join()
    os.close(read)
    assert ended.exit_code == 0
    assert sum(map(len, got)) == 5_000_000


def test_a_reader_that_takes_nothing_stops_the_run_for_a_limited_time(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.recover.output.STUCK_S", 0.5)
    monkeypatch.setattr(Output.finish, "__defaults__", (0.2,))
    read, write = os.pipe()
    output = Output(attempt.log, stdout=write)
    with contextlib.closing(output):
        ended = attempt.run_with(output, python("for _ in range(400): os.write(1, b'x' * 10_000)"))
    os.close(read)
    os.close(write)
    assert ended.exit_code == 0
    assert attempt.log.stat().st_size == 4_000_000
    assert any("could not be passed on" in note for note in ended.notes)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_stop_the_run_and_is_said_once(attempt: Attempt) -> None:
    attempt.log.symlink_to("/dev/full")
    ended = attempt.run(python("for _ in range(50): os.write(1, b'x' * 1000); time.sleep(0.001)"))
    assert ended.exit_code == 0
    assert attempt.stdout.read_bytes() == b"x" * 50_000
    assert [note for note in ended.notes if "misses some of the output" in note] == list(ended.notes)


def test_a_terminal_of_ours_gets_the_same_bytes_and_stays_as_it_is(attempt: Attempt) -> None:
    ours, terminal = os.openpty()
    tty.setraw(terminal)
    output = Output(attempt.log, stdout=terminal, stderr=terminal)
    with contextlib.closing(output):
        attempt.run_with(output, python("os.write(1, b'12%\\r13%\\n'); os.write(1, b'\\x1b[1mbold')"))
    assert os.get_blocking(terminal)  # the shell has it, too
    os.close(terminal)
    assert os.read(ours, 100) == b"12%\r13%\n\x1b[1mbold"
    os.close(ours)


def test_standard_input_is_empty(attempt: Attempt) -> None:
    attempt.run(python("print(repr(sys.stdin.read()))"))
    assert attempt.stdout.read_text() == "''\n"


def test_descriptors_of_our_caller_reach_the_command(attempt: Attempt) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    attempt.run(python(f"os.write({write}, b'here')"))
    os.close(write)
    assert os.read(read, 100) == b"here"
    os.close(read)


def test_the_command_has_no_descriptor_of_ours(attempt: Attempt) -> None:
    attempt.run(python("print([number for number in range(256) if os.path.lexists(f'/proc/self/fd/{number}')])"))
    inherited = [number for number in range(3, 256) if _is_inheritable(number)]
    assert attempt.stdout.read_text() == f"{[0, 1, 2, *inherited]}\n"


def _is_inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def test_the_memory_limit_reaches_the_command_as_a_soft_limit(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, data_bytes=300 * MIB))
    script = """
        import resource
        print(resource.getrlimit(resource.RLIMIT_DATA))
        try:
            bytearray(400 * 2**20)
        except MemoryError:
            print("refused")
    """
    ended = attempt.run(python(script))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    assert attempt.stdout.read_text() == f"({300 * MIB}, {hard})\nrefused\n"
    assert ended.exit_code == 0


def test_the_fraction_of_a_card_reaches_the_command(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, memory_fraction=0.5))
    attempt.run(("sh", "-c", "echo $PYTORCH_ALLOC_CONF"), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert attempt.stdout.read_text() == "expandable_segments:True,per_process_memory_fraction:0.500000\n"


def test_peak_memory_is_the_commands(attempt: Attempt) -> None:
    ended = attempt.run(python("data = bytearray(150 * 2**20); del data"))
    assert ended.peak_rss_bytes is not None
    assert 150 * MIB < ended.peak_rss_bytes < 250 * MIB


# -------------------------------------------------------------------------------- progress


def test_progress_and_death_are_reported(attempt: Attempt) -> None:
    script = """
        tell("start", versions={"torch": "2.13"})
        tell("begin", step=3, max_steps=9)
        steps(4, 2)
        tell("died", exception="ValueError", message="no", phase="evaluate", step=5)
        sys.exit(1)
    """
    ended = attempt.run(python(script))
    assert (ended.progress.step, ended.progress.steps, ended.exit_code) == (5, 2, 1)
    assert ended.death is not None
    assert ended.phase is Phase.EVALUATE
    assert attempt.progress[-1] == ended.progress


# -------------------------------------------------------------------------------- signals


READY = "print('ready', flush=True); "


def _ready(attempt: Attempt) -> bool:
    return attempt.stdout.exists() and b"ready" in attempt.stdout.read_bytes()


@pytest.mark.parametrize(
    ("sent", "got"),
    [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGTERM")],
)
def test_a_signal_is_forwarded_once(attempt: Attempt, sent: int, got: str) -> None:
    script = """
        seen = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
        print("ready", flush=True)
        while not seen:
            time.sleep(0.01)
        time.sleep(0.7)
        print(*seen, flush=True)
    """
    attempt.when(lambda: _ready(attempt), lambda: attempt.stop.receive(sent))
    ended = attempt.run(python(script))
    assert attempt.stdout.read_text() == f"ready\n{got}\n"
    assert (ended.ended_by, ended.exit_code) == (EndedBy.USER, 0)


def test_a_cancel_ends_the_command(attempt: Attempt) -> None:
    attempt.when(lambda: _ready(attempt), attempt.stop.cancel)
    ended = attempt.run(python(READY + "time.sleep(60)"))
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGTERM)


def test_a_command_that_ignores_signals_is_killed_after_the_grace(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, grace_s=1.0))
    attempt.when(lambda: _ready(attempt), attempt.stop.cancel)
    ended = attempt.run(python("signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(60)"))
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGKILL)
    assert 1.0 <= ended.wall_time_s < 5.0


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, grace_s=60.0))

    def twice() -> None:
        attempt.stop.receive(signal.SIGINT)
        time.sleep(stop_module._APART_S + 0.1)
        attempt.stop.receive(signal.SIGINT)

    attempt.when(lambda: _ready(attempt), twice)
    ended = attempt.run(python("signal.signal(signal.SIGINT, signal.SIG_IGN); " + READY + "time.sleep(60)"))
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGKILL)
    assert ended.wall_time_s < 10.0


def test_the_same_signal_twice_at_once_is_one_request() -> None:
    now = [0.0]
    stop = stop_module.StopRequests(clock=lambda: now[0])
    stop.receive(signal.SIGTERM)
    now[0] += 0.01  # as `timeout` sends it
    stop.receive(signal.SIGTERM)
    assert stop.requested
    assert not stop.urgent
    now[0] += 1.0
    stop.receive(signal.SIGTERM)
    assert stop.urgent


def test_handlers_are_put_back() -> None:
    found = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    try:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        stop = stop_module.StopRequests()
        with stop.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            wait_until(lambda: stop.requested)
        assert stop.number == signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    finally:
        signal.signal(signal.SIGHUP, found)


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = stop_module.StopRequests()
        with stop.handled():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_starts_once_a_stop_was_asked_for(attempt: Attempt) -> None:
    attempt.stop.cancel()
    ended = attempt.run(("touch", "begun"))
    assert (ended.exit_code, ended.ended_by) == (None, EndedBy.USER)
    assert not (attempt.folder / "begun").exists()


def test_a_launcher_that_dies_of_the_signal_leaves_its_trainer_the_grace(attempt: Attempt) -> None:
    trainer = "trap '' TERM; echo ready; sleep 2; echo saved"
    attempt.when(lambda: _ready(attempt), attempt.stop.cancel)
    ended = attempt.run(python("subprocess.Popen(['sh', '-c', sys.argv[1]]); time.sleep(60)", trainer))
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGTERM)
    assert attempt.stdout.read_text() == "ready\nsaved\n"


def test_data_workers_are_spared_the_sigterm_on_which_their_trainer_saves(attempt: Attempt) -> None:
    script = """
        worker = subprocess.Popen(["sleep", "60"])
        tell("start")
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        print("ready", flush=True)
        while not asked:
            time.sleep(0.05)
        time.sleep(0.2)
        print("worker", worker.poll(), flush=True)
    """
    argv = ("sh", "-c", '"$0" "$@"; exit 9', *python(script))  # the launcher has no handler
    attempt.when(lambda: bool(attempt.progress) and _ready(attempt), attempt.stop.cancel)
    ended = attempt.run(argv)
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGTERM)
    assert attempt.stdout.read_text() == "ready\nworker None\n"


def test_what_a_trainer_left_behind_does_not_use_up_the_grace(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, grace_s=60.0))
    attempt.when(lambda: _ready(attempt), attempt.stop.cancel)
    script = "subprocess.Popen(['sh', '-c', \"trap '' TERM; sleep 60\"]); tell('start'); print('ready', flush=True)"
    began = time.monotonic()
    ended = attempt.run(python(script + "; time.sleep(60)"))
    assert (ended.ended_by, ended.signal) == (EndedBy.USER, signal.SIGTERM)
    assert time.monotonic() - began < 10.0


# -------------------------------------------------------------------------------- what is left behind


def test_nothing_of_a_command_that_ended_well_stays(attempt: Attempt) -> None:
    mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
    script = """
        code = "import time; time.sleep(60)"
        subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1]])
        subprocess.Popen([sys.executable, "-S", "-c", code, sys.argv[1]], start_new_session=True)
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.execv(sys.executable, [sys.executable, "-S", "-c", "import signal, time;"
                    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", sys.argv[1]])
            os._exit(0)
    """
    ended = attempt.run(python(script, mark))
    assert ended.exit_code == 0
    assert ended.wall_time_s < 3.0  # the command's own
    assert living(mark) == []


# -------------------------------------------------------------------------------- rules


def test_a_hung_step_is_a_stall(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, stall_floor_s=1.0))
    script = """
        tell("start"); tell("begin", step=0)
        steps(1, 5)
        while True:
            print("still printing", flush=True)
            time.sleep(0.2)
    """
    ended = attempt.run(python(script))
    assert (ended.ended_by, ended.signal) == (EndedBy.STALL, signal.SIGTERM)
    assert any("no step after step 5" in note for note in ended.notes)


def test_a_stopped_command_that_stalls_is_ended_too(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, stall_floor_s=0.5))
    ended = attempt.run(python("tell('begin', step=0); steps(1, 5); os.kill(os.getpid(), signal.SIGSTOP)"))
    assert ended.ended_by is EndedBy.STALL


def test_no_first_step_is_a_start_limit(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, limits=replace(QUICK, start_s=1.0))
    ended = attempt.run(python("tell('start'); time.sleep(60)"))
    assert ended.ended_by is EndedBy.START_LIMIT


def test_a_rank_that_dies_ends_the_others(attempt: Attempt) -> None:
    script = """
        if "RANK" in os.environ:
            tell("start")
            if _rank == 1:
                time.sleep(0.3)
                tell("died", exception="torch.OutOfMemoryError", message="CUDA out of memory", oom=True)
                sys.exit(1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            tell("begin", step=0, world_size=2)
            time.sleep(60)
        ranks = [subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1], sys.argv[1]],
                                  env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
        for rank in ranks:
            rank.wait()
    """
    argv = python(script)
    ended = attempt.run((*argv, argv[-1]))
    assert ended.ended_by is EndedBy.RANK
    assert ended.death is not None
    assert ended.death.rank == 1
    assert ended.wall_time_s < 8.0


def test_a_rank_that_is_killed_ends_the_others(attempt: Attempt) -> None:
    script = """
        if "RANK" in os.environ:
            tell("start")
            if _rank == 1:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            tell("begin", step=0, world_size=2)
            time.sleep(60)
        ranks = [subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1], sys.argv[1]],
                                  env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
        for rank in ranks:
            rank.wait()
    """
    argv = python(script)
    ended = attempt.run((*argv, argv[-1]))
    assert ended.ended_by is EndedBy.RANK
    assert any("a rank's process is gone" in note for note in ended.notes)


def test_a_launcher_that_ends_by_itself_after_a_rank_died_keeps_its_exit_code(attempt: Attempt) -> None:
    script = """
        tell("start")
        _rank = 1
        tell("start")
        tell("died", exception="torch.OutOfMemoryError", message="CUDA out of memory")
        time.sleep(0.5)
        sys.exit(3)
    """
    ended = attempt.run(python(script))
    assert (ended.ended_by, ended.exit_code) == (EndedBy.ITSELF, 3)


def test_a_spill_is_asked_to_save_and_stop(attempt: Attempt) -> None:
    attempt.watch = lambda: Device(kind="cuda", index=0, name="RTX", total_bytes=8 * GIB, free_bytes=GIB, wsl=True)
    script = """
        tell("begin", step=0)
        tell("step", step=1, seconds=0.1, reserved=9 * 2**30)
        control = os.path.join(os.environ["AUTOTUNE_ATTEMPT"], "control.json")
        while not os.path.exists(control):
            time.sleep(0.05)
        print(json.load(open(control))["do"])
    """
    ended = attempt.run(python(script))
    assert (ended.ended_by, ended.exit_code) == (EndedBy.SPILL, 0)
    assert attempt.stdout.read_text() == "save_and_stop\n"


def test_a_driver_that_hangs_holds_nothing_up(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.recover.card.CardWatch.read.__defaults__", (0.2,))
    attempt.watch = lambda: time.sleep(30)
    ended = attempt.run(("true",))
    assert ended.exit_code == 0
    assert ended.free_before_bytes is None


def test_the_cards_memory_is_waited_for_and_told(attempt: Attempt) -> None:
    free = iter([8 * GIB, 2 * GIB, 3 * GIB, 8 * GIB - MIB])
    last = [8 * GIB - MIB]
    attempt.watch = lambda: Device(
        kind="cuda",
        index=0,
        name="RTX",
        total_bytes=8 * GIB,
        free_bytes=next(free, last[0]),
        tenants=(Tenant(pid=1, name="other", used_bytes=5),),
    )
    ended = attempt.run(("true",))
    assert ended.free_before_bytes == 8 * GIB
    assert ended.free_after_bytes == 8 * GIB - MIB
    assert ended.tenants_bytes == 5


def test_a_process_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a device that has hung: here, signals are lost."""
    monkeypatch.setattr("autotune.recover.ending.send", lambda process, number: False)
    monkeypatch.setattr("autotune.recover.ending._GIVE_UP_S", 0.5)
    monkeypatch.setattr("autotune.recover.supervise._DRAIN_S", 0.1)
    attempt = Attempt(tmp_path, limits=replace(QUICK, stall_floor_s=0.5))
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr("autotune.recover.start.subprocess.Popen", lambda *a, **o: _kept(started, *a, **o))
    ended = attempt.run(python("tell('begin', step=0); steps(1, 5); time.sleep(60)"))
    assert (ended.exit_code, ended.ended_by) == (None, EndedBy.STALL)
    assert any("processes that do not end" in note for note in ended.notes)
    started[0].kill()  # the keeper, and the kernel ends the command with it
    started[0].wait()


def _kept(started: list[subprocess.Popen[bytes]], *words: Any, **options: Any) -> subprocess.Popen[bytes]:
    started.append(_POPEN(*words, **options))
    return started[0]


_POPEN = subprocess.Popen


def test_an_error_of_our_own_leaves_nothing(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"ours-{os.getpid()}-{time.monotonic_ns()}"

    def fail(progress: object) -> None:
        raise RuntimeError("the status file cannot be written")

    monkeypatch.setattr(attempt, "progress", type("Failing", (), {"append": staticmethod(fail)})())
    with pytest.raises(RuntimeError, match="status file"):
        attempt.run(python("tell('start'); time.sleep(60)", mark))
    assert living(mark) == []
