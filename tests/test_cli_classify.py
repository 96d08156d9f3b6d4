"""`autotune classify` reads any log and prints one verdict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autotune.cli.classify import command
from autotune.errors import InvalidRequest

FOLDER = Path(__file__).with_name("data") / "oom"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in (FOLDER / "messages.jsonl").read_text().splitlines()]
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def run(*arguments: str, log: str | bytes | None = None) -> Result:
    return CliRunner().invoke(command, list(arguments), input=log)


@pytest.mark.parametrize("text", [row["text"] for row in ROWS])
def test_every_quoted_message_becomes_one_document(text: str) -> None:
    result = run("--json", log=text)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert list(document) == ["verdict", "evidence", "action", "settle", "numbers"]
    assert document["verdict"] in ("device_oom", "host_oom", "not_oom", "ambiguous")
    assert document["evidence"]
    assert document["action"]
    assert (document["settle"] is None) == (document["verdict"] != "ambiguous")


def test_a_file_and_standard_input_are_judged_alike(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(OOM)
    assert run(str(log), "--json").stdout == run("-", "--json", log=OOM).stdout


def test_text_shows_verdict_evidence_numbers_and_action() -> None:
    lines = run(log=OOM).stdout.splitlines()
    assert lines[0] == "device_oom"
    assert "CUDA out of memory" in lines[1]
    assert "tried 2.00 GiB" in lines[2]
    assert lines[-1].startswith("What to do: ")


def test_text_says_what_would_settle_an_ambiguous_case() -> None:
    assert "To settle it: the kernel log" in run("--exit-code", "137", log="").stdout


def test_exit_code_and_target_are_weighed() -> None:
    host = "MemoryError: Unable to allocate 2.00 GiB for an array with shape (3,)"
    assert json.loads(run("--json", "--exit-code", "0", log="").stdout)["verdict"] == "not_oom"
    assert json.loads(run("--json", "--exit-code", "-9", log="").stdout)["verdict"] == "ambiguous"
    assert json.loads(run("--json", log=host).stdout)["verdict"] == "host_oom"
    assert json.loads(run("--json", "--target", "cpu", log=host).stdout)["verdict"] == "device_oom"


def test_bytes_that_are_no_text_are_read_past() -> None:
    document = json.loads(run("--json", log=b"\xff\xfe\x00\x80\n" + OOM.encode() + b"\xff").stdout)
    assert document["verdict"] == "device_oom"


def test_of_a_long_file_beginning_and_end_are_read(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    log.write_text("Wärmelauf 12%\n" * 500_000 + OOM + "\n")
    assert json.loads(run(str(log), "--json").stdout)["verdict"] == "device_oom"


@pytest.mark.parametrize("name", ["missing.log", "."])
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, name: str) -> None:
    result = run(str(tmp_path / name))
    assert isinstance(result.exception, InvalidRequest)
    assert result.exception.exit_code == 1
    assert str(tmp_path / name) in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_terminal_on_standard_input_is_a_usage_error() -> None:
    ours, theirs = os.openpty()
    code = "from autotune.cli.main import main; import sys; sys.argv = ['autotune', 'classify']; main()"
    done = subprocess.run([sys.executable, "-c", code], stdin=theirs, capture_output=True, timeout=60, check=False)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert b"Give a FILE" in done.stderr


def test_help_has_an_example_and_needs_no_torch() -> None:
    code = "import sys; from autotune.cli.classify import command; command(['-'], standalone_mode=False)"
    code += "; assert not {'torch', 'rich', 'optuna', 'sqlite_utils'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], input=b"ValueError: x", timeout=60, check=True, stdout=subprocess.DEVNULL
    )
    assert "autotune classify train.log --exit-code 1" in run("--help").stdout
