"""`autotune run` on small commands: exit codes, what it changes, what it says, and one line where it cannot."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from autotune.fitfile import SCHEMA, write_fit
from autotune.recover.jobs import open_jobs
from autotune.values import TrainingConfig

PROGRAM = [sys.executable, "-c", "from autotune.cli.main import main; main()", "run", "--gpu", "cpu"]
PLAN = TrainingConfig(sequence_length=512, micro_batch_size=2, gradient_accumulation_steps=4)

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are kept by Linux's own means")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("AUTOTUNE_HOME", str(home))
    return home


def autotune(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def a_plan(path: Path, *, gpu: str | None = None, model: str = "org/model", config: TrainingConfig = PLAN) -> Path:
    gpu_facts = {} if gpu is None else {"name": gpu}
    write_fit(path, {"schema": SCHEMA, "model": {"name": model}, "gpu": gpu_facts, "config": config}, force=False)
    return path


# What passes through


@linux
@pytest.mark.parametrize("code", [0, 3, 77])
def test_the_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    words = [sys.executable, "-c", f"print('ModuleNotFoundError: no'); raise SystemExit({code})"]
    assert autotune("--", *words, cwd=tmp_path).returncode == code


@linux
def test_a_command_that_a_signal_ended_gives_128_more(tmp_path: Path) -> None:
    script = "import os, signal; print('ValueError: x', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    assert autotune("--restarts", "0", "--", sys.executable, "-c", script, cwd=tmp_path).returncode == 139


@linux
def test_its_output_is_the_commands_and_its_own_lines_go_to_stderr(tmp_path: Path) -> None:
    done = autotune("--", sys.executable, "-c", "print('42')", cwd=tmp_path)
    assert done.stdout == "42\n"
    assert all(line.startswith("autotune: ") for line in done.stderr.splitlines())


@linux
def test_a_word_of_the_command_is_no_option_of_ours(tmp_path: Path) -> None:
    script = "import sys; print(sys.argv[1:])"
    done = autotune("--", sys.executable, "-c", script, "--help", "--gpu", "x", "a b", "$HOME", cwd=tmp_path)
    assert done.stdout == "['--help', '--gpu', 'x', 'a b', '$HOME']\n"


@linux
def test_a_bug_is_not_tried_again(tmp_path: Path) -> None:
    script = "open('tries', 'a').write('x'); raise ValueError('a bug')"
    done = autotune("--", sys.executable, "-c", script, cwd=tmp_path)
    assert (tmp_path / "tries").read_text() == "x"
    assert done.returncode == 1
    assert "It was no lack of memory" in done.stderr


@linux
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.py"], "can't open file"),
        (["-m", "no_such_module"], "No module named"),
        (["-c", "import argparse; argparse.ArgumentParser().parse_args()", "--x"], "unrecognized arguments: --x"),
    ],
)
def test_a_wrong_command_line_is_not_tried_again(tmp_path: Path, words: list[str], said: str) -> None:
    done = autotune("--", sys.executable, *words, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\nautotune: It was no lack of memory at its start: it said: ") == 1
    assert "attempt 2" not in done.stderr
    assert said in done.stderr


@linux
@pytest.mark.parametrize("way", ["arguments", "placeholders"])
def test_a_trainer_that_reports_nothing_steps_down_too(tmp_path: Path, way: str) -> None:
    (tmp_path / "train.py").write_text(
        "import sys\n"
        "micro = int(sys.argv[2])\n"
        "print(micro, flush=True)\n"
        "if micro > 2: sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.')\n"
    )
    plan = a_plan(tmp_path / "fit.yaml", config=replace(PLAN, micro_batch_size=4, gradient_accumulation_steps=2))
    options, words = {
        "arguments": (["--no-hook"], ["--per_device_train_batch_size", "4", "--output_dir", "o"]),
        "placeholders": (["--plan", plan], ["--batch", "{micro_batch_size}", "{gradient_accumulation_steps}"]),
    }[way]
    done = autotune("--memory-limit", "1GiB", *options, "--", sys.executable, "train.py", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "4\n2\n"), done.stderr


@linux
def test_what_is_unclear_is_tried_once_more(tmp_path: Path) -> None:
    script = "open('tries', 'a').write('x'); raise SystemExit(3)"
    done = autotune("--", sys.executable, "-c", script, cwd=tmp_path)
    assert (tmp_path / "tries").read_text() == "xx"
    assert done.returncode == 3


@linux
def test_a_bare_run_is_a_row_that_status_shows(tmp_path: Path) -> None:
    autotune("--", sys.executable, "-c", "pass", cwd=tmp_path)
    autotune("--", sys.executable, "-c", "raise ValueError('no')", cwd=tmp_path)
    with open_jobs() as store:
        jobs = store.jobs()
        assert [(job.kind, job.state.value, job.exit_code) for job in jobs] == [
            ("run", "finished", 0),
            ("run", "failed", 1),
        ]
        assert [incident.judgement.verdict.value for _, incident in store.incidents(jobs[1].id)] == ["not_oom"]


@linux
def test_a_run_that_cannot_be_started_is_a_failed_row_and_its_hook_hears_of_it(tmp_path: Path) -> None:
    program, hook = tmp_path / "program", tmp_path / "hook.py"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o700)
    hook.write_text("import os, pathlib; pathlib.Path('told').write_text(os.environ['AUTOTUNE_EVENT'])")
    done = autotune("--on-failed", shlex.join([sys.executable, str(hook)]), "--", program, cwd=tmp_path)
    assert done.returncode == 126
    assert (tmp_path / "told").read_text() == "failed"
    with open_jobs() as store:
        assert [(job.state.value, job.exit_code) for job in store.jobs()] == [("failed", 126)]


@linux
def test_a_terminal_that_is_gone_or_a_full_disk_behind_stderr_ends_no_run(tmp_path: Path) -> None:
    words = [*PROGRAM, "--", sys.executable, "-c", "print('42')"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"42\n")


@linux
def test_the_run_folder_is_private_and_holds_output_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = "print('out'); raise ValueError('no')"
    autotune("--run-folder", folder, "--", sys.executable, "-c", script, cwd=tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert b"out\n" in (folder / "output.log").read_bytes()
    assert "ValueError" in (folder / "report.md").read_text()
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.stat().st_mode & 0o077 for path in files} == {0}


@linux
def test_a_home_that_a_run_makes_is_private_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "new" / "home"
    monkeypatch.setenv("AUTOTUNE_HOME", str(home))
    before = os.umask(0o002)
    try:
        done = autotune("--", sys.executable, "-c", "pass", cwd=tmp_path)
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o700
    assert "chmod" not in done.stderr


@linux
def test_a_hook_that_fails_is_said_in_a_line_of_ours(tmp_path: Path) -> None:
    done = autotune("--on-finished", "no-such-program", "--", sys.executable, "-c", "pass", cwd=tmp_path)
    assert done.returncode == 0
    assert all(line.startswith("autotune: ") for line in done.stderr.splitlines()), done.stderr
    assert "no-such-program" in done.stderr


@linux
def test_hooks_hear_of_the_end(tmp_path: Path) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text("import os, pathlib; pathlib.Path('told').write_text(os.environ['AUTOTUNE_EVENT'])")
    words = shlex.join([sys.executable, str(hook)])
    autotune("--on-finished", words, "--on-failed", words, "--", sys.executable, "-c", "pass", cwd=tmp_path)
    assert (tmp_path / "told").read_text() == "finished"


@linux
def test_one_signal_is_forwarded_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    script = "import time, pathlib; pathlib.Path('up').touch(); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([*PROGRAM, "--", sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    with open_jobs() as store:
        assert [job.state.value for job in store.jobs()] == ["cancelled"]
    (state,) = (tmp_path / "home" / "runs").glob("*/run.json")
    assert json.loads(state.read_text())["finished"] is False


@linux
def test_a_run_that_ended_well_is_no_failure_where_its_folder_cannot_be_written_by_then(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = f"import os; os.rename({str(folder)!r}, {str(folder)!r} + '-gone')"
    done = autotune("--run-folder", folder, "--", sys.executable, "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run.json cannot be written" in done.stderr


# What it says before it runs anything


def dry(*words: str | Path, cwd: Path) -> list[str]:
    done = autotune("--dry-run", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dry_run_shows_both_launches_and_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("open('ran', 'w')")
    lines = dry(
        "--", sys.executable, "train.py", "--per_device_train_batch_size", "8", "--output_dir", "o", cwd=tmp_path
    )
    assert lines[0].endswith("train.py --per_device_train_batch_size 8 --output_dir o")
    then = next(line for line in lines if line.startswith("After an out-of-memory"))
    assert "--per_device_train_batch_size 4" in then
    assert "--gradient_accumulation_steps 2" in then
    assert "--resume_from_checkpoint o/checkpoint-NEWEST" in then
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "home").rglob("run.json"))


def test_a_plan_changes_what_the_effective_batch_allows(tmp_path: Path) -> None:
    plan = a_plan(tmp_path / "fit.yaml")
    words = ["train.py", "--per_device_train_batch_size", "8", "--output_dir", "o"]
    lines = dry("--plan", plan, "--", sys.executable, *words, cwd=tmp_path)
    assert "--per_device_train_batch_size 2" in lines[0]
    assert "--gradient_accumulation_steps 4" in lines[0]


ARGUMENTS = [sys.executable, "train.py", "--per_device_train_batch_size", "8", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("options", "words", "code", "said"),
    [
        ([], [], 2, "there is no command"),
        ([], ["no-such-program"], 127, "no-such-program"),
        ([], ["./notes.txt"], 126, "notes.txt"),
        ([], ["python train.py --x 1"], 127, "--"),
        ([], [*ARGUMENTS, "--save_strategy", "no"], 125, "--without-checkpoints"),
        (["--no-hook"], [sys.executable, "-c", "pass"], 125, "AUTOTUNE_PLAN"),
        (["--plan", "none.yaml"], ARGUMENTS, 125, "none.yaml"),
        (["--plan", "notes.txt"], ARGUMENTS, 125, "is not a fit file"),
        (["--plan", "card.yaml"], ARGUMENTS, 125, "is a fit for RTX 4090"),
        (["--plan", "fit.yaml"], [*ARGUMENTS, "--model_name_or_path", "org/other"], 125, "org/other"),
        (["--plan", "batch.yaml"], ARGUMENTS, 125, "--effective-batch-size 8"),
        (["--plan", "fit.yaml", "--fit"], ARGUMENTS, 2, "--plan and --fit"),
        (["--fit"], ARGUMENTS, 125, "--model"),
        (["--memory-limit", "1KiB"], ARGUMENTS, 125, "memory"),
        (["--memory-limit", "much"], ARGUMENTS, 2, "--memory-limit"),
        (["--resume"], ARGUMENTS, 125, "--resume"),
        (["--run-folder"], ARGUMENTS, 2, "--run-folder': its value is missing before --"),
        (["--model"], ARGUMENTS, 2, "--model': its value is missing before --"),
        (["--run-folder", "full"], ARGUMENTS, 125, "is not empty"),
        (["--run-folder", "notes.txt"], ARGUMENTS, 125, "--run-folder"),
        (["--restarts", "-1"], ARGUMENTS, 2, "restarts"),
        (["--on-failed", "'"], ARGUMENTS, 125, "--on-failed"),
        (["--job", "7"], [], 125, "there is no job 7"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(
    tmp_path: Path, options: list[str], words: Sequence[str], code: int, said: str
) -> None:
    (tmp_path / "train.py").write_text("open('ran', 'w')")
    (tmp_path / "notes.txt").write_text("schema: none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    a_plan(tmp_path / "fit.yaml")
    a_plan(tmp_path / "card.yaml", gpu="RTX 4090")
    a_plan(tmp_path / "batch.yaml", config=replace(PLAN, gradient_accumulation_steps=8))
    done = autotune(*options, "--", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in error_of(done)
    assert not (tmp_path / "ran").exists()


@linux
def test_a_folder_that_was_removed_is_named_as_such(tmp_path: Path) -> None:
    words = shlex.join([*PROGRAM, "--", sys.executable, "-c", "pass"])
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", f"rmdir {shlex.quote(str(gone))}; {words}"], cwd=gone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "change into one that is there" in error_of(done)


def test_a_database_that_others_can_write_is_refused(tmp_path: Path, home: Path) -> None:
    home.chmod(0o777)
    done = autotune("--job", "1", cwd=tmp_path)
    assert done.returncode == 125
    assert "chmod go-w" in error_of(done)


@linux
def test_two_runs_do_not_write_to_one_output_folder(tmp_path: Path) -> None:
    script = "import time, pathlib; pathlib.Path('up').touch(); time.sleep(60)"
    words = [sys.executable, "-c", script, "--output_dir", "o", "--per_device_train_batch_size", "8"]
    first = subprocess.Popen([*PROGRAM, "--", *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = autotune("--run-folder", tmp_path / "other", "--", *words, cwd=tmp_path)
        assert second.returncode == 125
        assert "writes its checkpoints to" in error_of(second)
    finally:
        first.terminate()
        first.wait(60)


@linux
def test_a_fit_ends_with_the_run_that_asked_for_it(tmp_path: Path) -> None:
    fit = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    words = [sys.executable, "-c", fit]
    script = f"from autotune.cli.run_fit import _run; _run({words!r})"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) as parent:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
    child = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
