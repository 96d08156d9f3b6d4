"""`autotune estimate` up to its first dry run: what is asked, of which card, and every mistake in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from autotune.cli import estimate_run
from autotune.cli.estimate import command
from autotune.cli.estimate_question import choose_target, sweep_values, with_its_dtype
from autotune.cli.estimate_text import print_estimate, print_sweep
from autotune.cli.fit_text import print_fit
from autotune.cli.group import run
from autotune.errors import AutotuneError, InvalidRequest, UsageError
from autotune.hardware.cards import find_card
from autotune.predict.forecast import cpu_target, forecast, target_of_card
from autotune.probe.bootstrap import DRY_RUN
from autotune.probe.dry_run import DryRunFailed
from autotune.values import GIB, Device, FitStatus, ModelSource, Recommendation
from tests.fakes import a_cpu, a_request
from tests.test_predict_plot import CONFIG as STEP
from tests.test_predict_plot import a_trace
from tests.tiny import CONFIG, a_config
from tests.trial_records import trial

SETTINGS = "model: ./tiny.json\nsequence_length: 512\nmicro_batch_size: 2\n"
T4, A100 = (target_of_card(find_card(name).card) for name in ("T4", "A100 80GB"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a config, of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("autotune.hardware.readers.read_machine", lambda: SimpleNamespace(gpus=(), devices=()))
    monkeypatch.setattr(estimate_run, "DryRunner", never)
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    (tmp_path / "config.yaml").write_text(SETTINGS)
    (tmp_path / "link.svg").symlink_to("config.yaml")
    (tmp_path / "here.svg").write_text("")
    os.mkfifo(tmp_path / "pipe.svg")
    return tmp_path


def never(*_: object) -> None:
    raise AssertionError("a dry run was begun")


def refused(*arguments: str) -> tuple[int, str]:
    """(exit code, message) of what was typed."""
    with pytest.raises((AutotuneError, click.ClickException)) as caught:
        command.main(list(arguments), standalone_mode=False)
    return int(getattr(caught.value, "exit_code", 1)), str(caught.value)


GIVEN = ("--gpu", "A100 80GB", "--config", "config.yaml")
SEARCH = ("--gpu", "A100 80GB", "--model", "tiny.json")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "tiny.json"], 2, "no GPU is visible here: name a card with --gpu"),
        (["--gpu", "auto", "--model", "tiny.json"], 4, "no GPU is visible here: name a card with --gpu"),
        (["--gpu", "CUDA:0", "--model", "tiny.json"], 4, "no GPU is visible here"),
        (["--gpu", "cpu", "--config", "config.yaml", "--in-use", "1GiB"], 2, "--in-use is of a GPU's memory"),
        (["--gpu", "CPU ", "--config", "config.yaml", "--in-use", "lots"], 2, '--in-use: "lots" is not a memory size'),
        ([*GIVEN, "--in-use", "81GiB"], 1, "--in-use 81.0 GiB is above the"),
        ([*GIVEN, "--memory-limit", "x" * 5000], 2, '--memory-limit: "xxx'),
        (["--gpu", "cpu", "--model", "tiny.json", "--attention", "flash_attention_2"], 1, "give --attention sdpa"),
        (["--gpu", "T4", "--model", "tiny.json", "--attention", "flash_attention_2"], 1, "does not run on Tesla T4"),
        ([*GIVEN, "--trainer", "trl"], 2, "--trainer and --config: the file says it already"),
        ([*GIVEN, "--sweep", "sequence_length=512..1024", "--history", "h"], 2, "--history and --sweep"),
        ([*GIVEN, "--sweep", "sequence_length=٥..9"], 2, "sequence_length=512..8192"),
        ([*GIVEN, "--sweep", "sequence_length=512..8192"], 1, "give --sweep lengths of 4096 or less"),
        ([*GIVEN, "--plot", "out", "--history", "./out"], 2, "--plot and --history have one name"),
        ([*GIVEN, "--plot", "config.yaml", "--force"], 2, "is the --config file"),
        ([*GIVEN, "--history", "link.svg", "--force"], 2, "is the --config file"),
        ([*GIVEN, "--plot", "pipe.svg", "--force"], 1, "pipe.svg is no regular file"),
        ([*GIVEN, "--plot", "/dev/null", "--force"], 1, "/dev/null is no regular file"),
        ([*GIVEN, "--plot", "here.svg"], 1, "here.svg exists: give --force"),
        ([*GIVEN, "--plot", "no/such/out"], 1, "no/such is no folder"),
        ([*GIVEN, "--plot", "x" * 5000], 1, "cannot be written (File name too long)"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_what_cannot_be_asked_is_said_before_a_dry_run(
    folder: Path, arguments: Sequence[str], code: int, words: str
) -> None:
    exit_code, message = refused(*arguments)
    assert words in message
    assert exit_code == code
    assert "\n" not in message
    assert (folder / "config.yaml").read_text() == SETTINGS


@pytest.mark.parametrize(
    ("gpu", "line", "words"),
    [
        (
            "T4",
            "attention: flash_attention_2",
            "flash_attention_2 does not run on Tesla T4: give attention: sdpa, or eager",
        ),
        ("cpu", "attention: flash_attention_2", "flash_attention_2 does not run on CPU"),
        ("T4", "optimizer: adamw_8bits", "config.yaml: optimizer adamw_8bits is not known to transformers"),
        ("T4", "optimizer: ''", "optimizer must be the name of an optimizer"),
        ("T4", "sequence_length: 5000", "is there twice"),
    ],
)
def test_a_config_that_cannot_run_is_said_before_a_dry_run(folder: Path, gpu: str, line: str, words: str) -> None:
    (folder / "config.yaml").write_text(f"{SETTINGS}{line}\n")
    code, message = refused("--gpu", gpu, "--config", "config.yaml")
    assert words in message
    assert code == 1


def test_a_length_of_a_config_is_advised_on_in_its_words(folder: Path) -> None:
    (folder / "config.yaml").write_text(SETTINGS.replace("512", "5000"))
    assert "give sequence_length: 4096 or less" in refused(*GIVEN)[1]


def test_attention_that_a_model_lacks_is_advised_on_in_a_files_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lacking:
        def __init__(self, *_: object) -> None: ...
        def close(self) -> None: ...
        def prepare(self, *_: object) -> None: ...

        def trace(self, *_: object) -> None:
            raise DryRunFailed("x has no attention sdpa: give --attention eager", lacks="attention")

        forecast = trace

    monkeypatch.setattr(estimate_run, "DryRunner", Lacking)
    assert refused(*GIVEN)[1] == "x has no attention sdpa: give attention: eager"
    assert refused(*SEARCH, "--attention", "sdpa")[1].endswith("give --attention eager")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("sequence_length=512..4096", [512, 1024, 2048, 4096]),
        ("sequence_length=512..5000", [512, 1024, 2048, 4096, 5000]),
        ("sequence_length=7..7", [7]),
        ("sequence_length=512, 768,512", [512, 768]),
    ],
)
def test_a_sweep_reaches_the_end_of_its_range(text: str, values: list[int]) -> None:
    assert sweep_values(text) == values


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "9..5",
        "0..5",
        "1_0",
        "5..",
        "-1..5",
        "²",
        "1" * 5000,
        "1,,2",
        "1..99999999",
        ",".join(map(str, range(1, 99))),
    ],
    ids=lambda text: str(text)[:20],
)
def test_a_sweep_of_no_lengths_is_a_usage_error(rest: str) -> None:
    with pytest.raises(UsageError) as caught:
        sweep_values(f"sequence_length={rest}")
    assert len(str(caught.value)) < 200


def test_nothing_in_use_is_a_size() -> None:
    assert choose_target("T4", None, "0").others_bytes == 0
    assert choose_target("T4", None, "1GiB").others_bytes == GIB
    assert choose_target(" CPU", "1GiB") == cpu_target("CPU", GIB)
    with pytest.raises(InvalidRequest):
        choose_target("T4", None, "17GiB")


@pytest.mark.parametrize(
    ("target", "dtype", "stated", "taken", "said"),
    [
        (T4, "bfloat16", False, "float16", "has no units for bfloat16: compute_dtype: float16 is predicted"),
        (T4, "bfloat16", True, "bfloat16", "give compute_dtype: float16"),
        (T4, "float32", True, "float32", ""),
        (A100, "bfloat16", False, "bfloat16", ""),
        (cpu_target("CPU", None), "bfloat16", False, "bfloat16", ""),
    ],
)
def test_a_dtype_that_a_card_lacks_is_told(
    target: Any, dtype: str, stated: bool, taken: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_its_dtype(a_config(compute_dtype=dtype), target, stated=stated).compute_dtype == taken
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == bool(said)


def test_on_the_cpu_what_is_allocated_is_what_is_held() -> None:
    found = forecast(a_trace(), STEP, cpu_target("CPU", None))
    assert found.memory.peak_reserved_bytes == found.memory.peak_allocated_bytes == found.device_used_bytes
    for name in ("peak_reserved_bytes", "device_used_bytes"):
        low, high = found.intervals[name]
        assert low <= found.memory.peak_reserved_bytes <= high


ODD = "a[/b] [bold]x :smile:"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    target = replace(T4, card=None)  # no speed: the trace made by hand has no arithmetic
    found = forecast(a_trace(), STEP, target)
    print_estimate(ODD, target, found)
    print_sweep(ODD, target, [found])
    config = a_config(target_modules=[ODD], optimizer=ODD)
    proof = trial(config=config)
    request = a_request(model=ModelSource(name=ODD, config=CONFIG))
    device: Device = a_cpu(name=ODD)
    print_fit(
        Recommendation(
            status=FitStatus.FITTED, device=device, rehearsal=True, request=request, proof=proof, trials=(proof,)
        ),
        None,
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(ODD) >= 4
    assert "a[/b]" in printed


def test_a_word_without_end_is_cut_in_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", "estimate", "--trainer", "x" * 5000])
    assert run() == 2
    error = capsys.readouterr().err
    assert len(error) < 500
    assert "'transformers', 'trl', 'loop'" in error


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_dry_run_takes_its_folder_with_it(tmp_path: Path, how: str) -> None:
    """The parent is killed, or closes the channel."""
    own = tmp_path / "autotune-dry-run-1"
    own.mkdir()
    (own / "kept").write_text("")
    bootstrap = Path(estimate_run.__file__).parents[1] / "probe" / "bootstrap.py"
    parent = (
        "import os, signal, socket, subprocess, sys\n"
        "ours, theirs = socket.socketpair()\n"
        f"child = subprocess.Popen([sys.executable, '-P', {str(bootstrap)!r}, str(theirs.fileno()), str(os.getpid()),"
        f" {DRY_RUN!r}], pass_fds=(theirs.fileno(),), env={{**os.environ, 'TMPDIR': {str(own)!r}}}, stdout=2)\n"
        "theirs.close()\n"
        + ("os.kill(os.getpid(), signal.SIGKILL)" if how == "killed" else "ours.close(); sys.exit(child.wait())")
    )
    ended = subprocess.run(
        [sys.executable, "-c", parent], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60
    )
    assert ended.returncode == (-9 if how == "killed" else 1), ended.stderr  # stderr is open until the child has gone
    assert not own.exists()
