"""Wrong input to the command line: one line that says what to do, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from autotune.cli.bench import check_environment
from autotune.cli.fit_nothing import nothing_fits_line
from autotune.cli.group import run
from autotune.errors import AutotuneError, GpuUnavailable, InvalidRequest
from autotune.fitfile import read_fit
from autotune.hardware.ask_versions import torch_build
from autotune.hardware.cpu import read_cpu
from autotune.search.space import build_space
from autotune.tuner import failure_line, left_out
from autotune.values import Attention, Device, Failure, Judgement, LossPath, ModelSource, ProbeReport, Upcast, Verdict
from gpu_db.store import open_store
from tests import fake_nvml
from tests.fakes import a_cpu, a_request
from tests.test_tuner import Scene, limited
from tests.tiny import CONFIG, ENVIRONMENT, a_config
from tests.trial_records import trial

SCRIPT = Path(sys.executable).with_name("autotune")
PROGRAM = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-c", "from autotune.cli.main import main; main()"]
ROOT = Path(__file__).parent.parent
SOON_S = 1.5  # to an answer that needs no worker

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, /dev/full and limits of a process as Linux has them")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong: the last of stderr, after notes and progress."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("Error: ")]
        assert len(errors) == 1, self.err
        assert errors == lines[-1:], self.err
        assert "Traceback" not in self.err
        return errors[0]


@dataclass(frozen=True)
class Terminal:
    """Where commands are typed: a folder with wrong files of every kind, and a database of its own."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def fit(self) -> list[str]:
        """A fit that would work; an option given again after it counts instead."""
        return ["fit", "--gpu", "cpu", "--no-prediction", "--model", str(self.folder / "tiny.json")]

    def run(self, *arguments: str, **options: Any) -> Ended:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "AUTOTUNE_HOME": str(self.home), **self.variables}
        done = subprocess.run(
            [*PROGRAM, *arguments],
            **{
                "env": environment,
                "cwd": self.folder,
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "timeout": 280,
                **options,
            },
        )
        return Ended(done.returncode, done.stdout or "", done.stderr or "")


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    return a_terminal(tmp_path)


def a_terminal(folder: Path) -> Terminal:
    """Its folder holds config.json files, data sets and places for --output, named after what is wrong with them."""
    configs: dict[str, Any] = {
        "tiny": CONFIG,
        "bert": {**CONFIG, "model_type": "bert"},
        "t5": {**CONFIG, "model_type": "t5", "is_encoder_decoder": True},
        "vit": {**CONFIG, "model_type": "vit"},
        "unheard_of": {**CONFIG, "model_type": "frobnicator"},
        "layerless": {**CONFIG, "num_hidden_layers": 0},
        "act": {**CONFIG, "hidden_act": "no_such_activation"},
        "bloom": {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500},
        "list": [CONFIG],
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "truncated.json").write_text(json.dumps(CONFIG)[:60])
    (folder / "empty.json").write_text("")
    (folder / "empty.jsonl").write_text("")
    (folder / "text.jsonl").write_text("hello\n")
    (folder / "rows.jsonl").write_text('{"text": "hello"}\n')
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "none.jsonl").write_text('{"length": 0}\n')
    (folder / "data.frob").write_text("hello\n")
    (folder / "there.yaml").write_text("kept")
    spaces = {
        "lists": "fix: [attention=sdpa]\nexclude: [loss=liger]\ngradient_checkpointing: [off, full]\n",
        "typo": "gradient_chekpointing: [off]\n",
        "deep": "fix:\n  attention: sdpa\n",
        "none": "loss: []\n",
        "length": "sequence_length: [128, 256]\n",
    }
    for name, text in spaces.items():
        (folder / f"space_{name}.yaml").write_text(text)
    (folder / "folder").mkdir()
    return Terminal(folder)


@pytest.fixture
def typed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs the command line in this process: a hundred wrong lines in the time of ten processes."""
    monkeypatch.chdir(terminal.folder)
    monkeypatch.setenv("AUTOTUNE_HOME", str(terminal.home))

    def typed(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["autotune", *arguments])
        code = run()
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return typed


Typed = Callable[..., Ended]


def check_refused(ended: Ended, code: int, words: str) -> None:
    """Refused at once: no worker was started, and nothing is on stdout."""
    assert words in ended.error
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert "Fitting" not in ended.err


NUMBER = "9" * 5000
WRONG: dict[str, tuple[Sequence[str], int, str]] = {
    "no such model": (["--model", "no-such-model"], 1, "no-such-model is not known here"),
    "a name like a model's": (["--model", "Llama-3-8"], 1, "nearest built-in ids: "),
    "an empty model": (["--model", ""], 2, "'--model': it is empty"),
    "a model of bytes": (["--model", "\udcff\udcfe\x01"], 1, r"\udcff\udcfe\x01 is not known here"),
    "a model of two lines": (["--model", "a\nb"], 1, r"a\nb is not known here"),
    "a model without end": (["--model", "x" * 5000], 1, "is not known here"),
    "no such folder": (["--model", "./absent"], 1, "no such file or folder: ./absent"),
    "a folder without a config": (["--model", "folder"], 1, "folder has no config.json"),
    "an encoder": (["--model", "bert.json"], 1, "choose a decoder"),
    "an encoder and decoder": (["--model", "t5.json"], 1, "choose one that generates text"),
    "a model of images": (["--model", "vit.json"], 1, "choose one that generates text"),
    "an unheard-of architecture": (["--model", "unheard_of.json"], 1, "does not know the model_type frobnicator"),
    "a model without layers": (["--model", "layerless.json"], 1, "num_hidden_layers of layerless.json is below 1"),
    "a truncated config": (["--model", "truncated.json"], 1, "copy or download it again"),
    "an empty config": (["--model", "empty.json"], 1, "copy or download it again"),
    "a config that is a list": (["--model", "list.json"], 1, "give a model's config.json"),
    "real weights of a bare config": (["--weights", "real"], 1, "has no weights"),
    "real weights of an id": (["--weights", "real", "--model", "Qwen/Qwen2.5-7B"], 1, "need a local folder"),
    "a card that is not here": (["--gpu", "RTX 9999"], 4, '"RTX 9999" is not in this machine'),
    "a card by a number too high": (["--gpu", "cuda:9"], 4, "cuda:9 is not in this machine"),
    "a card by half a number": (["--gpu", "cuda:x"], 4, "cuda:x is not in this machine"),
    "a card by a wrong UUID": (["--gpu", "GPU-0000"], 4, "GPU-0000 is not in this machine"),
    "an empty card": (["--gpu", ""], 2, "'--gpu': it is empty"),
    "a limit of nothing": (["--memory-limit", "0"], 2, "--memory-limit: "),
    "a limit of too little": (["--memory-limit", "1KiB"], 1, "give more"),
    "a limit above the machine": (["--memory-limit", "99TiB"], 1, "give at most that"),
    "a limit in words": (["--memory-limit", "twelve"], 2, "write it like 12GiB"),
    "an empty limit": (["--memory-limit", ""], 2, "'--memory-limit': it is empty"),
    "a negative limit": (["--memory-limit", "-5"], 2, "write it like 12GiB"),
    "a limit of 5000 digits": (["--memory-limit", NUMBER], 2, "write it like 12GiB"),
    "headroom above the limit": (["--headroom", "2GiB"], 1, "--headroom 2.0 GiB leaves less than"),
    "headroom of the limit": (["--headroom", "1500MiB"], 1, "give less"),
    "headroom that leaves a crumb": (["--headroom", "1499MiB"], 1, "give less"),
    "headroom in words": (["--headroom", "some"], 2, "--headroom: "),
    "longer than the model": (["--sequence-length", "5000"], 1, "give --sequence-length 4096 or less"),
    "minimum longer than the model": (["--min-sequence-length", "5000"], 1, "give --min-sequence-length 4096 or less"),
    "no length": (["--sequence-length", "0"], 2, "2 or more"),
    "one token, so nothing to learn": (["--sequence-length", "1"], 2, "2 or more"),
    "a length in words": (["--sequence-length", "long"], 2, "not long"),
    "a length of 5000 digits": (["--sequence-length", NUMBER], 2, "a whole number"),
    "minimum above the length": (
        ["--sequence-length", "128", "--min-sequence-length", "256"],
        2,
        "--min-sequence-length 256 is above --sequence-length 128",
    ),
    "minimum above the rank": (
        ["--lora-rank", "8", "--min-lora-rank", "16"],
        2,
        "--min-lora-rank 16 is above --lora-rank 8",
    ),
    "a batch of none": (["--effective-batch-size", "0"], 2, "1 or more"),
    "a negative batch": (["--effective-batch-size", "-4"], 2, "1 or more"),
    "half a batch": (["--effective-batch-size", "2.5"], 2, "a whole number"),
    "a batch in words": (["--effective-batch-size", "many"], 2, "a whole number"),
    "a batch past counting": (["--effective-batch-size", str(10**20)], 2, "at most"),
    "rank 0": (["--lora-rank", "0"], 2, "1 or more"),
    "rank past 64 bits": (["--lora-rank", str(2**70)], 2, "at most"),
    "dropout above 1": (["--lora-dropout", "1.5"], 2, "from 0 to below 1"),
    "dropout of all": (["--lora-dropout", "1"], 2, "from 0 to below 1"),
    "negative dropout": (["--lora-dropout", "-0.1"], 2, "from 0 to below 1"),
    "dropout that is no number": (["--lora-dropout", "nan"], 2, "from 0 to below 1"),
    "an unknown optimizer": (["--optimizer", "adamw_tosch"], 2, "the nearest are adamw_torch"),
    "an optimizer like none": (["--optimizer", "?"], 2, "the usual ones are"),
    "an unknown trainer": (["--trainer", "trlx"], 2, "'transformers', 'trl'"),
    "no target module": (["--target-modules", ","], 2, "all-linear"),
    "a missing data set": (["--dataset", "absent.jsonl"], 1, "absent.jsonl: no such file"),
    "an empty data set": (["--dataset", "empty.jsonl"], 1, "holds no samples"),
    "a data set of text": (["--dataset", "text.jsonl"], 1, "text.jsonl, line 1: is not JSON"),
    "a folder as a data set": (["--dataset", "folder"], 1, "give one dataset file"),
    "a data set of another kind": (["--dataset", "data.frob"], 1, "cannot read this format; give one of"),
    "a data set without a name": (["--dataset", ""], 1, "is a folder"),
    "a tokenizer without a data set": (["--tokenizer", "folder"], 2, "give --dataset too"),
    "no such tokenizer": (["--dataset", "rows.jsonl", "--tokenizer", "no/such"], 1, "no such tokenizer in the Hugging"),
    "a tokenizer's folder without one": (["--dataset", "rows.jsonl", "--tokenizer", "folder"], 1, "no tokenizer.json"),
    "a tokenizer of text": (["--dataset", "rows.jsonl", "--tokenizer", "text.jsonl"], 1, "cannot be read"),
    "a data set of empty text": (["--dataset", "blank.jsonl"], 1, "not one of its 1 samples holds a token"),
    "a data set of length 0": (["--dataset", "none.jsonl"], 1, "not one of its 1 samples holds a token"),
    "epochs without end": (["--epochs", "inf"], 2, "above 0"),
    "epochs that are no number": (["--epochs", "nan"], 2, "above 0"),
    "no epoch": (["--epochs", "0"], 2, "above 0"),
    "output into a missing folder": (["--output", "absent/fit.yaml"], 1, "make it first"),
    "output over a file": (["--output", "there.yaml"], 1, "give --force to overwrite it"),
    "output over a folder": (["--output", "folder", "--force"], 1, "is a folder"),
    "output without a name": (["--output", ""], 1, "is a folder"),
    "output under a file": (["--output", "tiny.json/fit.yaml"], 1, "give another --output"),
    "output of a name too long": (["--output", "x" * 5000], 1, "give another --output"),
    "plot into a missing folder": (["--plot", "absent/fit.svg"], 1, "another --plot"),
    "plot over a file": (["--plot", "there.yaml"], 1, "another --plot"),
    "plot over a folder": (["--plot", "folder", "--force"], 1, "--plot folder is a folder"),
    "plot where the output goes": (
        ["--plot", "./fit.yaml", "--output", "folder/../fit.yaml"],
        2,
        "--plot and --output",
    ),
    "output of two lines": (["--output", "a\nb/fit.yaml"], 1, r"a\nb is no folder"),
    "no interpreter": (["--python", "./absent"], 1, "give --python the interpreter"),
    "an interpreter that is a folder": (["--python", "./folder"], 1, "give --python the interpreter"),
    "an interpreter that is a text": (["--python", "./there.yaml"], 1, "give --python the interpreter"),
    "a program that is no Python": (["--python", "/bin/echo"], 1, "give --python the interpreter"),
    "an empty interpreter": (["--python", ""], 2, "'--python': it is empty"),
    "no probes": (["--max-probes", "0"], 2, "1 or more"),
    "a budget in words": (["--budget", "soon"], 2, "write it like 90s, 5min or 1h"),
    "a budget of nothing": (["--budget", "0s"], 2, "above 0"),
    "a negative budget": (["--budget", "-5s"], 2, "not -5s"),
    "a budget of another unit": (["--budget", "3days"], 2, "90s, 5min or 1h"),
    "a budget of 5000 digits": (["--budget", NUMBER], 2, "up to 30 days"),
    "a budget of years": (["--budget", "9999h"], 2, "up to 30 days"),
    "a tolerance above all": (["--tolerance", "1.5"], 2, "from 0 to 0.5"),
    "a negative tolerance": (["--tolerance", "-1%"], 2, "from 0 to 0.5"),
    "a tolerance in words": (["--tolerance", "some"], 2, "such as 0.01 or 1%"),
    "fixed without a value": (["--fix", "attention"], 2, "such as attention=sdpa"),
    "fixed to nothing": (["--fix", "attention="], 2, "such as attention=sdpa"),
    "an empty fix": (["--fix", ""], 2, "it is empty"),
    "a field with a typo": (["--fix", "atention=sdpa"], 2, "did you mean attention?"),
    "a field of another kind": (["--fix", "colour=red"], 2, "fields are micro_batch_size, "),
    "a field of 5000 letters": (["--exclude", "x" * 5000 + "=1"], 2, "is no field of a search"),
    "an attention that nobody knows": (["--fix", "attention=flash"], 2, "attention must be one of eager, sdpa, flash"),
    "a micro batch in words": (["--fix", "micro_batch_size=many"], 2, "micro_batch_size must be a whole number"),
    "a micro batch of 5000 digits": (["--fix", f"micro_batch_size={NUMBER}"], 2, "must be a whole number"),
    "a checkpointing that nobody knows": (["--exclude", "gradient_checkpointing=some"], 2, "off, full, offload or"),
    "a flag in words": (["--fix", "double_quant=perhaps"], 2, "double_quant must be true or false"),
    "an optimizer fixed wrongly": (["--fix", "optimizer=adamw_tosch"], 2, "--fix optimizer adamw_tosch is not known"),
    "an optimizer excluded wrongly": (["--exclude", "optimizer=adamx"], 2, "--exclude optimizer adamx is not known"),
    "a length fixed": (["--fix", "sequence_length=128"], 2, "use --sequence-length and --min-sequence-length"),
    "a rank excluded": (["--exclude", "lora-rank=16"], 2, "use --lora-rank and --min-lora-rank"),
    "modules fixed": (["--fix", "target_modules=q_proj"], 2, "use --target-modules and --allow-fewer-modules"),
    "an accumulation fixed": (["--fix", "gradient_accumulation_steps=4"], 2, "use micro_batch_size"),
    "a dtype fixed": (["--fix", "compute_dtype=float16"], 2, "use --compute-dtype"),
    "fixed and excluded": (
        ["--fix", "attention=sdpa", "--exclude", "attention=sdpa"],
        2,
        "attention=sdpa is fixed and excluded",
    ),
    "fixed twice": (
        ["--fix", "loss=full", "--fix", "loss=chunked"],
        2,
        "--fix loss=full and --fix loss=chunked contradict each other",
    ),
    "fixed otherwise than the file": (
        ["--space", "space_lists.yaml", "--fix", "gradient_checkpointing=every_2"],
        2,
        "contradicts --space, which allows off or full",
    ),
    "no such space": (["--space", "absent.yaml"], 1, "absent.yaml cannot be read"),
    "a folder as a space": (["--space", "folder"], 1, "it is a folder"),
    "a space of text": (["--space", "there.yaml"], 1, "holds no keys: write lines such as micro_batch_size: 4"),
    "a space with a typo": (["--space", "space_typo.yaml"], 1, "did you mean gradient_checkpointing?"),
    "a space too deep": (["--space", "space_deep.yaml"], 1, "'fix' holds more than one value or a list of names"),
    "a space with a field of nothing": (["--space", "space_none.yaml"], 1, "loss has no values"),
    "a space with a length": (["--space", "space_length.yaml"], 1, "--min-sequence-length"),
    "flash attention on the CPU": (
        ["--fix", "attention=flash_attention_2"],
        1,
        "attention is fixed to flash_attention_2, but FlashAttention 2 does not run on cpu. Fix another value",
    ),
    "a micro batch that does not divide the batch": (
        ["--fix", "micro_batch_size=3"],
        1,
        "does not divide the 8 samples of an optimizer step: give one of 1, 2, 4, 8, or --allow near",
    ),
    "a micro batch that is not even near": (["--fix", "micro_batch_size=5"], 1, "give one of 1, 2, 4, 8"),
    "every micro batch excluded": (
        ["--effective-batch-size", "2", "--exclude", "micro_batch_size=1", "--exclude", "micro_batch_size=2"],
        1,
        "every micro_batch_size is excluded: leave one of 1, 2 in",
    ),
    "every attention excluded": (["--exclude", "attention=sdpa"], 1, "every value of attention that can run here"),
    "an optimizer that is near": (["--fix", "optimizer=adamw_bnb_8bit"], 1, "it needs --allow near"),
    "another optimizer": (["--fix", "optimizer=sgd"], 1, "so give --optimizer sgd"),
    "packing without lengths": (["--fix", "packing=true"], 1, "--dataset"),
    "an option without its value": (["--model"], 2, "requires an argument"),
    "an unknown option": (["--bogus"], 2, "(see autotune fit --help)"),
    "an argument too many": (["cuda:0"], 2, "(see autotune fit --help)"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_one_line_at_once(
    terminal: Terminal, typed: Typed, arguments: Sequence[str], code: int, words: str
) -> None:
    check_refused(typed(*terminal.fit, *arguments), code, words)
    check_refused(typed(*terminal.fit, "--json", *arguments), code, words)
    assert not terminal.home.exists()
    assert (terminal.folder / "there.yaml").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fitt"], 2, "did you mean fit?"),
        (["frobnicate"], 2, "the commands are fit, "),
        (["--bogus"], 2, "(see autotune --help)"),
        (["classify", "absent.log"], 1, "Give the path of a log."),
        (["classify", "folder"], 1, "Give the path of a log."),
        (["classify", "--exit-code", "seven", "there.yaml"], 2, "(see autotune classify --help)"),
        (["export"], 2, "Missing argument"),
        (["export", "there.yaml"], 2, "Missing option '--to'. Choose from: transformers, trl"),
        (["export", "absent.yaml", "--to", "trl"], 1, "autotune fit --output"),
        (["export", "there.yaml", "--to", "trl"], 1, "is not a fit file"),
        (["gpus", "--jsom"], 2, "--json"),
    ],
)
def test_other_commands_are_as_clear(typed: Typed, arguments: Sequence[str], code: int, words: str) -> None:
    check_refused(typed(*arguments), code, words)


def test_doctor_exits_1_where_a_check_fails(terminal: Terminal) -> None:
    ended = terminal.run("doctor", "--python", "./absent")
    assert ended.code == 1
    assert "cannot be run" in ended.out


def test_no_command_at_all_shows_the_help_on_stderr(typed: Typed) -> None:
    ended = typed()
    assert (ended.code, ended.out) == (2, "")
    assert "Commands:" in ended.err


def test_headroom_may_be_nothing(terminal: Terminal, typed: Typed) -> None:
    refused = typed(*terminal.fit, "--headroom", "0", "--sequence-length", "5000")
    assert "sequence length 5,000" in refused.error  # which comes after the sizes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["fit", "--gpu", "cpu", "--model", "no/such-model"], 1, "no/such-model is not known here"),
        (["fit", "--gpu", "cuda:9"], 4, "cuda:9"),
        (["fit", "--gpu", "cpu", "--model", "tiny.json", "--effective-batch-size", "2.5"], 2, "2.5"),
        (["fit", "--gpu", "cpu", "--model", "tiny.json", "--python", "/bin/echo"], 1, "/bin/echo"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_the_installed_command_refuses_in_a_moment(
    terminal: Terminal, arguments: Sequence[str], code: int, words: str
) -> None:
    times = []
    for _ in range(3):
        began = time.monotonic()
        check_refused(terminal.run(*arguments), code, words)
        times.append(time.monotonic() - began)
        if min(times) < SOON_S:
            return
    pytest.fail(f"it took {min(times):.1f} s")


# The database


def a_database(home: Path) -> Path:
    with open_store(home, read_cpu()) as store:
        return store.path


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(9000))


def a_newer_layout(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def of_another_program(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE songs (name)")
    connection.commit()
    connection.close()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (garbage, "is damaged: move it"),
        (a_newer_layout, "upgrade autotune"),
        (of_another_program, "is not a GPU database of autotune: move it away"),
        (a_folder, "move it away"),
    ],
)
def test_a_spoilt_database_is_left_as_it_is(
    terminal: Terminal, typed: Typed, spoil: Callable[[Path], None], words: str
) -> None:
    path = a_database(terminal.home)
    spoil(path)
    before = None if path.is_dir() else path.read_bytes()
    check_refused(typed(*terminal.fit), 1, words)
    assert path.is_dir() if before is None else path.read_bytes() == before


@linux
@pytest.mark.parametrize("home", ["{folder}/tiny.json", "{folder}/tiny.json/home", "/proc", "/dev/null"])
def test_a_database_that_cannot_be_written_is_said_before_the_first_probe(
    terminal: Terminal, typed: Typed, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("AUTOTUNE_HOME", home.format(folder=terminal.folder))
    check_refused(typed(*terminal.fit), 1, "point AUTOTUNE_HOME at a folder of yours")


def files_up_to(size: int) -> Callable[[], None]:
    """Every file of the process ends there: what a full disk or a quota does to it."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@linux
def test_no_room_for_a_database_is_said_before_the_first_probe(terminal: Terminal) -> None:
    ended = terminal.run(*terminal.fit, preexec_fn=files_up_to(20_000))
    check_refused(ended, 1, "full disk")


@linux
def test_no_room_for_a_trial_ends_the_fit_and_keeps_what_is_stored(terminal: Terminal) -> None:
    path = a_database(terminal.home)
    python = an_interpreter(terminal.folder, f"{FAILS}; sys.exit(0)")
    ended = terminal.run(*terminal.fit, "--python", python, preexec_fn=files_up_to(24_000))
    assert ended.code == 1
    assert "full disk" in ended.error
    with open_store(terminal.home, read_cpu()) as store:
        assert store.path == path
        assert store.trials() == []


# Workers that misbehave

VERSIONS = {
    name: getattr(ENVIRONMENT, name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
}
FAILS = (
    'send(event="phase", name="build"); send(event="report", report={"failure": {"phase": "build",'
    ' "exception": "RuntimeError", "message": "The NVIDIA driver on your system is too old\\nsecond line"}})'
)


def an_interpreter(folder: Path, body: str, torch: str = "2.13.0") -> str:
    """A program that says it has every package, and runs `body` in a worker's place."""
    script = f"""\
        #!{sys.executable}
        import json, os, signal, socket, sys, time
        if "ask_" in sys.argv[2]:
            versions = dict.fromkeys(sys.argv[3:]) | { ({**VERSIONS, "trl": None, "torch": torch})!r}
            print(json.dumps({{"python": "3.12.1", "versions": versions}}))
            sys.exit()
        channel = socket.socket(fileno=int(sys.argv[3]))
        def send(**message):
            channel.sendall(json.dumps(message).encode() + b"\\n")
        """
    path = folder / "python"
    path.write_text(textwrap.dedent(script) + body + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('a library says no'); sys.exit(1)", "exit code 1; it last printed: a library says no"),
        ("sys.exit(1)", "exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        (FAILS, "a probe failed in phase build, and not for memory: RuntimeError: The NVIDIA driver on your system is"),
    ],
)
def test_a_worker_that_dies_is_one_line_and_its_trial_is_kept(terminal: Terminal, body: str, words: str) -> None:
    ended = terminal.run(*terminal.fit, "--json", "--python", an_interpreter(terminal.folder, body))
    assert words in ended.error
    assert (ended.code, ended.out) == (1, "")
    assert "autotune doctor" in ended.error
    with open_store(terminal.home, read_cpu()) as store:
        assert len(store.trials()) == len(ended.err.splitlines()) - 2  # the line that opens, the error


def test_a_worker_that_hangs_is_ended_and_said(terminal: Terminal) -> None:
    python = an_interpreter(terminal.folder, f"open({str(terminal.folder / 'pid')!r}, 'a').write(f'{{os.getpid()}} ')")
    Path(python).write_text(Path(python).read_text() + "time.sleep(600)\n")
    code = """\
        from autotune.cli.main import main
        from autotune.values import ProbeLimits
        ProbeLimits.__init__.__kwdefaults__["start_s"] = 1.0
        main()
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *terminal.fit, "--python", python],
        env={**os.environ, "AUTOTUNE_HOME": str(terminal.home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert "timeout of a probe in phase start" in ended.error
    assert (ended.code, ended.out) == (1, "")
    pids = [int(pid) for pid in (terminal.folder / "pid").read_text().split()]
    assert len(pids) == 2  # it was tried once more
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_an_environment_without_the_packages_is_told_what_to_install(terminal: Terminal, typed: Typed) -> None:
    venv.create(terminal.folder / "venv", with_pip=False, symlinks=True)
    ended = typed(*terminal.fit, "--python", str(terminal.folder / "venv" / "bin" / "python"))
    check_refused(ended, 1, "pip install torch transformers peft bitsandbytes accelerate")
    assert not terminal.home.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode"])
def test_layers_that_are_no_linear_are_quantised_as_transformers_does(kind: str) -> None:
    """Their classes initialise their own output projection, which is 4-bit codes here."""
    import torch

    from autotune.workload.build import build_base

    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500, "n_positions": 128}
    source = ModelSource(name=kind, config={"model_type": kind, **shape})
    base = build_base(source, a_config(), torch.device("cpu"))
    assert base.model.transformer.h[0].attn.c_proj.weight.dtype == torch.uint8
    assert base.model.transformer.h[0].ln_1.weight.device.type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-modules", "no_such_module"], "no_such_module"),
        (["--model", "act.json"], "no_such_activation"),
        (["--model", "bloom.json"], "has no attention sdpa for bloom.json: give --attention eager"),
    ],
)
def test_what_only_a_worker_can_know_is_one_line_too(terminal: Terminal, arguments: list[str], words: str) -> None:
    ended = terminal.run(*terminal.fit, *arguments)
    assert words in ended.error
    assert (ended.code, ended.out) == (1, "")
    assert ended.error.endswith("Change the setting or the model that this is about")


@pytest.mark.parametrize(
    ("report", "judgement", "line"),
    [
        (
            ProbeReport(log_tail="  warnings.warn("),
            Judgement(verdict=Verdict.NOT_OOM, evidence=("a loss is not finite",), action="Mend it."),
            "a probe failed, and not for memory: a loss is not finite. Mend it",
        ),
        (
            ProbeReport(signal=40, failure=Failure(phase="forward")),
            Judgement(verdict=Verdict.AMBIGUOUS, action="Settle it.", settle="the log"),
            "ambiguous death of a probe in phase forward: killed by 40. Settle it. What would settle it: the log",
        ),
        (
            ProbeReport(failure=Failure(phase="prepare", exception="a.b.UnsupportedModel", message="loss liger: no.")),
            Judgement(verdict=Verdict.NOT_OOM, action="Mend it."),
            "loss liger: no. Change the setting or the model that this is about",
        ),
    ],
)
def test_a_death_is_told_by_what_is_known_of_it(report: ProbeReport, judgement: Judgement, line: str) -> None:
    assert failure_line(replace(trial(), report=report, judgement=judgement)) == line


# Cards

CARD = Device(kind="cuda", index=0, name="NVIDIA L4")


@pytest.fixture
def with_a_card(terminal: Terminal) -> Terminal:
    """A machine whose driver says that it has a card, with two processes on it."""
    card = fake_nvml.environment(cards=fake_nvml.RTX_3060, processes="0|4000001|512|compute;0|4000002|na|compute")
    return replace(terminal, variables=card)


@pytest.mark.skipif(torch_build().get("cuda") is not None, reason="needs a CPU build of torch")
@pytest.mark.parametrize("gpu", ["cuda:0", "auto", "3060", "GPU-aaaa1111"])
def test_a_card_beside_a_cpu_torch_exits_4_and_points_to_doctor(with_a_card: Terminal, gpu: str) -> None:
    ended = with_a_card.run("fit", "--gpu", gpu, "--model", "tiny.json")
    check_refused(ended, 4, "autotune doctor")
    assert "is not built for CUDA" in ended.error
    assert "process 4000001 (train-4000001) holds 512.0 MiB of this card" in ended.err
    assert "process 4000002 (train-4000002) holds unknown memory of this card" in ended.err


def test_a_card_that_the_worker_cannot_use_points_to_doctor(with_a_card: Terminal) -> None:
    python = an_interpreter(with_a_card.folder, FAILS, torch="2.13.0+cu130")
    ended = with_a_card.run("fit", "--gpu", "cuda:0", "--model", "tiny.json", "--python", python)
    assert (ended.code, ended.out) == (1, "")
    assert "The NVIDIA driver on your system is too old" in ended.error
    assert "autotune doctor" in ended.error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "cuda:3"], 4, "here is NVIDIA GeForce RTX 3060 (cuda:0"),
        (["--gpu", "4090"], 4, "`autotune gpus` lists what is"),
        (["--gpu", "cuda:0", "--memory-limit", "13GiB"], 1, "above the 12.0 GiB of NVIDIA GeForce RTX 3060"),
        (["--gpu", "cuda:0", "--headroom", "12GiB"], 1, "--headroom 12.0 GiB leaves less than 64.0 MiB"),
    ],
)
def test_what_a_card_has_not_is_said_with_what_it_has(
    with_a_card: Terminal, arguments: list[str], code: int, words: str
) -> None:
    check_refused(with_a_card.run("fit", *arguments), code, words)


@pytest.mark.parametrize(
    ("torch", "error"),
    [
        ("2.13.0+cpu", GpuUnavailable),
        ("2.13.0+rocm6.4", GpuUnavailable),
        (None, InvalidRequest),
        ("2.13.0+cu130", None),
        ("2.13.0", None),
    ],
)
def test_a_torch_of_another_kind_is_told_apart(torch: str | None, error: type[AutotuneError] | None) -> None:
    environment = replace(ENVIRONMENT, torch=torch)
    if error is None:
        check_environment(environment, CARD, None)
        return
    with pytest.raises(error):
        check_environment(environment, CARD, None)


def test_a_setting_that_cannot_run_here_is_left_out_alone_and_said() -> None:
    request = a_request(attention=Attention.FLASH_ATTENTION_2, upcast=Upcast.FP32, loss=LossPath.CHUNKED)
    space = build_space(request, a_cpu())
    assert (space.start.attention, space.start.upcast, space.start.loss) == ("sdpa", "fp32", "chunked")
    reason = "FlashAttention 2 does not run on cpu"
    assert left_out(space) == (f"attention=flash_attention_2 was asked for and left out: {reason}",)
    assert left_out(build_space(a_request(), a_cpu())) == ()


# Output that nobody takes


@pytest.mark.parametrize("arguments", [["gpus"], ["gpus", "--json"], ["fit", "--help"], ["--help"]])
def test_a_reader_that_goes_early_is_no_error(terminal: Terminal, arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=terminal.folder
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 1)
    assert "Error" not in errors
    assert "Traceback" not in errors


@linux
@pytest.mark.parametrize("arguments", [["gpus"], ["gpus", "--json"], ["--help"]])
def test_a_full_disk_behind_stdout_is_one_line(terminal: Terminal, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = terminal.run(*arguments, stdout=full)
    assert ended.code == 1
    assert "No space left on device" in ended.error


# Whole fits, each run once

#: Of the document, as the documentation names them.
KEYS = ["schema", "status", "gpu", "model", "request", "config", "measured", "predicted", "trials", "probes"]
KEYS += ["from_database"]
WIDE = {**CONFIG, "hidden_size": 32, "intermediate_size": 196608, "num_hidden_layers": 1, "vocab_size": 512}
NARROW_LIMIT = ["--memory-limit", "560MiB", "--effective-batch-size", "1", "--lora-rank", "1", "--max-probes", "6"]


@dataclass(frozen=True)
class Fit:
    """A fit's terminal, its options and how it ended; asked again, the database answers."""

    terminal: Terminal
    options: list[str]
    ended: Ended

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.ended.out)
        return document

    def again(self, *options: str) -> Ended:
        return self.terminal.run(*self.terminal.fit, *self.options, *options)


def a_fit(folder: Path, *options: str) -> Fit:
    terminal = a_terminal(folder)
    (folder / "wide.json").write_text(json.dumps(WIDE))
    return Fit(terminal, [*options], terminal.run(*terminal.fit, *options, "--json"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder = tmp_path_factory.mktemp("fitted")
    return a_fit(folder, "--sequence-length", "64", "--effective-batch-size", "2", "--max-probes", "2")


@pytest.fixture(scope="module")
def stated(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A length that was asked for, does not fit, and may not be cut."""
    folder = tmp_path_factory.mktemp("stated")
    return a_fit(folder, "--model", "wide.json", *NARROW_LIMIT, "--sequence-length", "256")


@pytest.mark.slow
def test_fit_as_json_is_one_document(fitted: Fit) -> None:
    document = fitted.document
    assert fitted.ended.code == 0, fitted.ended.err
    assert [key for key in KEYS if key not in document] == []
    assert (document["schema"], document["status"]) == ("autotune.fit/1", "fitted")
    assert document["from_database"] is False
    assert document["gpu"]["rehearsal"] is True
    assert document["model"]["name"].endswith("tiny.json")
    assert document["config"]["sequence_length"] == 64
    assert document["measured"]["tokens_per_second"] > 0
    assert document["probes"]["count"] == len(document["trials"])
    assert {"config", "predicted", "report", "verdict", "origin"} <= set(document["trials"][0])
    assert "Fitting" in fitted.ended.err


@pytest.mark.slow
def test_a_known_answer_is_the_same_document_from_the_database(fitted: Fit) -> None:
    again = fitted.again("--json")
    document = json.loads(again.out)
    assert (again.code, again.err) == (0, "")
    assert document["from_database"] is True
    assert document["probes"]["count"] == 0
    assert [document[key] for key in ("status", "config", "measured")] == [
        fitted.document[key] for key in ("status", "config", "measured")
    ]
    assert [key for key in KEYS if key not in document] == []


@pytest.mark.slow
@linux
def test_the_file_is_written_though_nobody_reads_the_result(fitted: Fit) -> None:
    path = fitted.terminal.folder / "fit.yaml"
    with open("/dev/full", "w") as full:
        options = [*fitted.terminal.fit, *fitted.options, "--output", str(path)]
        ended = fitted.terminal.run(*options, stdout=full)
    assert ended.code == 1
    assert "No space left on device" in ended.error
    assert read_fit(path).config.sequence_length == 64


@pytest.mark.slow
def test_a_terminal_without_these_letters_shows_others(fitted: Fit) -> None:
    ascii_only = replace(fitted, terminal=replace(fitted.terminal, variables={"PYTHONIOENCODING": "ascii"}))
    ended = ascii_only.again()
    assert ended.code == 0
    assert "Proven in a fresh process" in ended.out


@pytest.mark.slow
@linux
def test_a_stated_length_that_does_not_fit_is_never_cut(stated: Fit) -> None:
    document = stated.document
    assert stated.ended.code == 3
    assert stated.ended.error.startswith("Error: nothing fits")
    assert "Try --min-sequence-length 128" in stated.ended.error
    assert (document["status"], document["config"], document["measured"]) == ("nothing_fits", None, None)
    assert [key for key in KEYS if key not in document] == []
    assert {one["config"]["sequence_length"] for one in document["trials"]} == {256}
    assert document["closest"]["verdict"] == "device_oom"


@pytest.mark.slow
@linux
def test_nothing_fits_is_known_afterwards_and_said_to_be(stated: Fit) -> None:
    again = stated.again("--json")
    assert again.code == 3
    assert "known from the database, nothing was run; --fresh measures again" in again.error
    assert json.loads(again.out)["from_database"] is True


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--sequence-length", "256", "--min-sequence-length", "64"], "--min-sequence-length allowed it"),
        ([], "none was stated"),
    ],
)
def test_a_length_that_may_be_cut_is_cut_and_said_loudly(tmp_path: Path, options: list[str], why: str) -> None:
    cut = a_fit(tmp_path, "--model", "wide.json", *NARROW_LIMIT, *options)
    assert cut.ended.code == 0, cut.ended.err
    length = cut.document["config"]["sequence_length"]
    assert 64 <= length < 256
    assert cut.document["request"]["sequence_length"] == 256
    shown = cut.again()
    assert f"ATTENTION: the sequence was CUT from 256 to {length} tokens ({why})" in shown.out


@pytest.mark.parametrize(
    ("changes", "offered", "not_offered"),
    [
        ({"lora_rank": 4}, "--allow near", "--min-lora-rank"),
        ({"lora_rank": 16}, "--min-lora-rank 4", "nothing was run"),
    ],
)
def test_only_consents_that_are_left_are_offered(changes: dict[str, Any], offered: str, not_offered: str) -> None:
    line = nothing_fits_line(Scene(request=limited(200, **changes)).fit())
    assert offered in line
    assert not_offered not in line
