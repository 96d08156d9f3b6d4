"""`autotune export` prints or writes a fit in a trainer's words, and one line where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from autotune.cli.export import command
from autotune.errors import InvalidRequest
from autotune.export import FORMATS, TRAINERS
from autotune.fitfile import SCHEMA, write_fit
from autotune.values import LossPath, TrainingConfig

CONFIG = TrainingConfig(
    sequence_length=512, micro_batch_size=2, gradient_checkpointing="every_2", loss=LossPath.CHUNKED
)


@pytest.fixture
def fit(tmp_path: Path) -> Path:
    path = tmp_path / "fit.yaml"
    write_fit(path, {"schema": SCHEMA, "model": {"name": "org/model"}, "gpu": {}, "config": CONFIG}, force=False)
    return path


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("to", "section"), [("transformers", "training_arguments"), ("trl", "sft_config")])
def test_yaml_goes_to_standard_output(fit: Path, to: str, section: str) -> None:
    result = export(fit, "--to", to)
    assert (result.exit_code, result.stderr) == (0, "")
    document = yaml.safe_load(result.stdout)
    assert document["model"] == "org/model"
    assert document[section]["per_device_train_batch_size"] == 2


def test_json_is_one_document(fit: Path) -> None:
    assert json.loads(export(fit, "--to", "trl", "--format", "json").stdout)["trainer"] == "trl"


@pytest.mark.parametrize("to", TRAINERS)
def test_python_compiles(fit: Path, to: str) -> None:
    compile(export(fit, "--to", to, "--format", "python").stdout, "train.py", "exec")


def test_a_file_is_written_and_kept_without_force(fit: Path, tmp_path: Path) -> None:
    output = tmp_path / "train.py"
    arguments = (fit, "--to", "trl", "--format", "python", "--output", output)
    result = export(*arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert str(output) in result.stderr
    written = output.read_text()
    assert "SFTTrainer" in written
    output.write_text("mine")
    assert isinstance(export(*arguments).exception, InvalidRequest)
    assert output.read_text() == "mine"
    assert export(*arguments, "--force").exit_code == 0
    assert output.read_text() == written


def test_a_version_that_cannot_do_it_is_an_error(fit: Path) -> None:
    result = export(fit, "--to", "transformers", "--transformers-version", "4.57.6")
    assert isinstance(result.exception, InvalidRequest)
    assert "upgrade transformers" in str(result.exception)
    assert result.stdout == ""


def test_a_missing_fit_is_an_error_and_a_wrong_trainer_is_usage(tmp_path: Path, fit: Path) -> None:
    assert "no such file" in str(export(tmp_path / "none.yaml", "--to", "trl").exception)
    assert export(fit, "--to", "axolotl").exit_code == 2
    assert export(fit).exit_code == 2


def test_help_offers_what_the_room_has_and_an_example() -> None:
    text = export("--help").stdout
    assert "autotune export fit.yaml --to trl" in text
    assert all(choice in text for choice in (*TRAINERS, *FORMATS))


def test_the_command_imports_nothing_heavy(fit: Path) -> None:
    code = (
        "import sys; from autotune.cli.export import command;"
        f"command(['{fit.as_posix()}', '--to', 'trl', '--format', 'python'], standalone_mode=False);"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'optuna', 'sqlite_utils'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
