"""`autotune estimate` as it is typed: cold once, then from the kept traces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import CONFIG

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SETTINGS = "sequence_length: 512\nmicro_batch_size: 2\ngradient_checkpointing: full\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, a config, and a trace of it that a first estimate made."""
    made = tmp_path_factory.mktemp("estimate")
    (made / "tiny.json").write_text(json.dumps(CONFIG))
    (made / "config.yaml").write_text(f"model: ./tiny.json\n{SETTINGS}")
    ended = typed(made, "--gpu", "T4", "--config", "config.yaml", "--json")
    assert ended.returncode == 0, ended.stderr
    (made / "first.json").write_text(ended.stdout)
    return made


def typed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "from autotune.cli.main import main; main()", "estimate", *arguments)


def python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "AUTOTUNE_HOME": str(folder / "home"), "HOME": str(folder)},
        timeout=250,
        check=False,
    )


def document(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_the_document_has_numbers_intervals_and_parts_that_sum(folder: Path) -> None:
    found = json.loads((folder / "first.json").read_text())
    predicted = found["predicted"]
    names = [name for name in predicted if name != "intervals"]
    assert set(predicted["intervals"]) == set(names)
    for name in names:
        low, high = predicted["intervals"][name]
        assert low <= predicted[name] <= high, name
    assert sum(found["parts"].values()) == predicted["peak_allocated_bytes"]
    assert found["fits"] is True
    assert predicted["after_load_bytes"] < predicted["forward_peak_allocated_bytes"]
    assert predicted["peak_allocated_bytes"] <= predicted["peak_reserved_bytes"] < predicted["device_used_bytes"]


def test_another_batch_and_length_need_no_torch(folder: Path) -> None:
    (folder / "other.yaml").write_text("model: ./tiny.json\nsequence_length: 1024\nmicro_batch_size: 5\n"
                                       "gradient_checkpointing: full\n")  # fmt: skip
    code = (
        "import sys; from autotune.cli.main import main; sys.argv = ['autotune', 'estimate', '--gpu', 'T4',"
        " '--config', 'other.yaml', '--json']\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    traces = sorted((folder / "home" / "traces").iterdir())
    ended = python(folder, code)
    found = document(ended)
    assert sorted((folder / "home" / "traces").iterdir()) == traces
    first = json.loads((folder / "first.json").read_text())
    assert found["predicted"]["peak_allocated_bytes"] > 2 * first["predicted"]["peak_allocated_bytes"]


def test_a_terminal_reads_the_parts_and_what_eats_most(folder: Path) -> None:
    ended = typed(folder, "--gpu", "T4", "--config", "config.yaml")
    assert ended.returncode == 0
    for words in ("Predicted, nothing was run", "fits in", "At the worst moment", "Less "):
        assert words in ended.stdout


def test_a_limit_that_is_too_small_is_said(folder: Path) -> None:
    found = document(typed(folder, "--gpu", "T4", "--config", "config.yaml", "--memory-limit", "100MiB", "--json"))
    assert found["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "RTX 9999", "--model", "tiny.json"], 1, "RTX 9999"),
        (["--gpu", "6000", "--model", "tiny.json"], 1, "6000"),
        (["--model", "tiny.json"], 2, "--gpu"),
        (["--gpu", "T4", "--config", "none.yaml"], 1, "none.yaml cannot be read"),
        (["--gpu", "T4", "--config", "config.yaml", "--model", "x"], 2, "give one of them"),
        (["--gpu", "T4", "--model", "tiny.json", "--sweep", "batch=1..2"], 2, "sequence_length=512..8192"),
        (["--gpu", "T4", "--model", "tiny.json", "--memory-limit", "lots"], 2, "not a memory size"),
        (["--gpu", "T4", "--config", "config.yaml", "--plot", "tiny.json"], 1, "--force"),
        (["--gpu", "T4", "--model", "no/such"], 1, "no/such"),
    ],
)
def test_a_wrong_word_costs_one_line(folder: Path, arguments: list[str], code: int, words: str) -> None:
    ended = typed(folder, *arguments)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"hidden_size": 65}, ""), ({"num_hidden_layers": -3}, ""), ({"model_type": "nonsense"}, "nonsense")],
)
def test_a_config_that_lies_about_itself_is_refused_in_one_line(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    lying = {**json.loads((folder / "tiny.json").read_text()), **change}
    (folder / "lying.json").write_text(json.dumps(lying))
    ended = typed(folder, "--gpu", "T4", "--model", "lying.json")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert words in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
