"""Which model is meant: good names resolve, and every bad input ends in one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidRequest, UsageError
from autotune.values import ModelSource
from autotune.workload.models import catalogue, check_config, check_optimizer, check_sequence_length, resolve_model

LLAMA = catalogue()["HuggingFaceTB/SmolLM2-135M"].config


def folder_with(path: Path, config: Any, *files: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    (path / "config.json").write_bytes(data)
    for name in files:
        (path / name).write_bytes(b"")
    return str(path)


# What resolves


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("META-LLAMA/llama-3.2-1b", "meta-llama/Llama-3.2-1B"),
        ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        (" smollm2-135m ", "HuggingFaceTB/SmolLM2-135M"),
        ("Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Instruct-2507"),
    ],
)
def test_built_in_names_resolve(name: str, means: str) -> None:
    source = resolve_model(name, offline=True)
    assert source == ModelSource(name=means, config=catalogue()[means].config)


def test_a_folder_and_its_config_json_are_the_same_model(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mine", LLAMA)
    by_folder, by_file = resolve_model(folder), resolve_model(f"{folder}/config.json")
    assert by_folder.config == LLAMA
    assert by_folder.fingerprint == by_file.fingerprint
    assert by_folder.folder is None


def test_a_link_to_a_folder_and_a_byte_order_mark_are_followed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "mine", b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    (tmp_path / "link").symlink_to(folder)
    assert resolve_model(str(tmp_path / "link")).config == LLAMA


def test_an_existing_path_goes_before_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder_with(tmp_path / "Llama-3.2-1B", LLAMA)
    assert resolve_model("Llama-3.2-1B").config == LLAMA


def test_what_is_handed_back_is_a_copy() -> None:
    resolve_model("Llama-3.2-1B").config["rope_scaling"]["factor"] = 1.0
    assert resolve_model("Llama-3.2-1B").config["rope_scaling"]["factor"] == 32.0


def test_notes_of_a_built_in_model_are_said() -> None:
    said: list[str] = []
    resolve_model("google/gemma-3-4b-pt", say=said.append)
    assert "text tower" in said[0]


def test_a_multimodal_config_is_accepted_and_said(tmp_path: Path) -> None:
    text = {**LLAMA, "max_position_embeddings": 512}
    said: list[str] = []
    config = {"model_type": "llava", "text_config": text, "vision_config": {"model_type": "siglip_vision_model"}}
    source = resolve_model(folder_with(tmp_path, config), say=said.append)
    assert source.max_positions == 512
    assert "text tower" in said[0]


def test_real_weights_come_with_their_folder(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA, "model.safetensors")
    for name in (folder, f"{folder}/config.json"):
        source = resolve_model(name, weights="real")
        assert (source.weights, source.folder) == ("real", str(tmp_path.resolve()))


def test_neither_torch_nor_transformers_nor_the_hub_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from autotune.workload.models import resolve_model as r; r('Llama-3.2-1B'); r(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder_with(tmp_path, LLAMA)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# What does not: files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated or damaged"),
        (json.dumps(LLAMA).encode()[:200], "truncated or damaged"),
        (b"<html>Not found</html>", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"model_type": "\xff"}', "not JSON, or damaged"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON, or damaged"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a": "' + b"x" * 10_000_000 + b'"}', "over 10 MB"),
        ([1, 2], "not a JSON object"),
        (None, "not a JSON object"),
        ({"hidden_size": 64}, "no model_type"),
        ({**LLAMA, "model_type": 3}, "no model_type"),
        ({"model_type": "llama"}, "does not say its size"),
        ({**LLAMA, "text_config": "gemma"}, "text_config"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:20],
)
def test_unreadable_configs_are_refused_in_one_line(content: Any, words: str, tmp_path: Path) -> None:
    refused_with(folder_with(tmp_path, content), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 7}, "7 heads do not divide hidden_size 576"),
        ({"num_key_value_heads": 2}, "2 key-value heads do not divide the 9 attention heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"intermediate_size": -1536}, "intermediate_size"),
        ({"num_hidden_layers": 30.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 1001}, "above 1,000"),
        ({"num_attention_heads": 10**6}, "above 10,000"),
        ({"num_local_experts": 4097}, "num_local_experts of"),
        ({"num_labels": 10**9}, "num_labels of"),
        ({"vision_config": {"model_type": "clip", "num_labels": 10**9}}, "above 100,000"),
        ({"id2label": {str(n): "x" for n in range(100_001)}}, "the size of id2label"),
        ({"label2id": ["x"]}, "label2id of"),
        ({"sliding_window": 10**15}, "above 2,147,483,648"),
        ({"sliding_window": -1}, "below 0"),
        ({"sliding_window": 4096.5}, "4096.5, not a whole number"),
        ({"rope_theta": 0}, "must be above 0 and finite, not 0"),
        ({"rope_theta": float("inf")}, "above 0 and finite, not Infinity"),
        ({"rope_theta": 10**400}, "not a number of more than 30 digits"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta of"),
        ({"rms_norm_eps": float("nan")}, "from 0 to 1, not NaN"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps of"),
        ({"attention_dropout": 1.0}, "at least 0 and below 1, not 1.0"),
        ({"hidden_size": {"a": {"b": 1}}}, "is an object, not a whole number"),
        ({"num_attention_heads": 0}, "below 1"),
        ({"num_key_value_heads": 0}, "below 1"),
        ({"vocab_size": 10**7 + 1}, "above 10,000,000"),
        ({"vocab_size": 10**4000}, "above 10,000,000"),
        ({"max_position_embeddings": "2048"}, '"2048", not a whole number'),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ({"intermediate_size": [1536, "x"]}, "a list, not a whole number"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps"),
        ({"model_type": "my_own"}, "never runs code from a model folder"),
        ({"model_type": "my_own", "auto_map": {"AutoConfig": "evil.Config"}}, "never runs code from a model folder"),
        ({"model_type": "[", "auto_map": {}}, "never runs code from a model folder"),
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "t5", "d_model": 64}, "not a causal language model"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "clip", "text_config": {"model_type": "clip_text_model"}}, "not a causal language model"),
        ({"model_type": "llava", "text_config": {**LLAMA, "hidden_size": -1}}, "(text_config)"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_values_that_lie_are_refused_in_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused_with(folder_with(tmp_path, {**LLAMA, **change}), words)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 64},
        {"num_key_value_heads": None},
        {"intermediate_size": [1536] * 30},
        {"max_position_embeddings": 10_485_760},  # Llama-4-Scout
        {"sliding_window": None, "attention_dropout": 0.1, "num_labels": 2, "id2label": {"0": "a", "1": "b"}},
        {"num_local_experts": 0},  # a dense model of a family with experts
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},  # stated, never run
        {"model_type": "bert", "is_decoder": True},
    ],
    ids=str,
)
def test_odd_but_true_values_are_accepted(change: dict[str, Any], tmp_path: Path) -> None:
    assert resolve_model(folder_with(tmp_path, {**LLAMA, **change})).config == {**LLAMA, **change}


def test_gpt2_names_are_read_too() -> None:
    with pytest.raises(InvalidRequest, match="7 heads do not divide hidden_size 768"):
        check_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 7}, "gpt2")


@pytest.mark.parametrize("name", ["adamw_torch_fuse", "", "x" * 5000])
def test_an_optimizer_that_transformers_does_not_know_is_one_short_line(name: str) -> None:
    check_optimizer("paged_adamw_8bit")
    with pytest.raises(UsageError, match=r"config.yaml: optimizer .* is not known to transformers") as refusal:
        check_optimizer(name, option="config.yaml: optimizer")
    assert "adamw_torch_fused" in str(refusal.value)
    assert len(str(refusal.value)) < 400


# What does not: paths


def test_paths_that_hold_no_model_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in {
        "empty": "has no config.json",
        "adapter": "holds an adapter",
        "odd": "not a file",
        "model.gguf": "neither a folder nor a .json file",
        "broken": "broken link",
        "round": "cannot read",
        "pipe.json": "not a file",
        "gone/config.json": "no such file or folder",
    }.items():
        refused_with(str(tmp_path / name), words)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_missing_permission_is_said() -> None:
    with as_nobody(), tempfile.TemporaryDirectory() as top:
        in_file, in_folder = folder_with(Path(top, "a"), LLAMA), folder_with(Path(top, "b"), LLAMA)
        os.chmod(f"{in_file}/config.json", 0)
        os.chmod(in_folder, 0)
        refused_with(in_file, "no permission to read")
        refused_with(in_folder, "no permission to read")
        refused_with(f"{in_folder}/config.json", "no permission to look")
        os.chmod(in_folder, 0o700)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "(empty)"),
        ("a\x00b", "not known"),
        ("\udcff\udcfe/x\ny", "\\udcff"),
        ("modèle/été", "not known"),
        ("x" * 5000, "…"),
        ("../../etc/nothing", "no such file or folder"),
        ("~nobody-here/x.json", "no such file or folder"),
        ("C:\\models\\mine", "no such file or folder"),
        ("owner/../name", "not known"),
        ("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"),
        ("Qwen/Qwen3-9B", "Qwen/Qwen3-8B"),
        ("someone/unheard-of", "downloads are off"),
    ],
    ids=ascii,
)
def test_unknown_names_get_one_line_with_what_works(name: str, words: str) -> None:
    message = refused_with(name, words)
    assert "built-in ids" in message


# Real weights


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "someone/unheard-of"])
def test_real_weights_need_a_local_folder(name: str) -> None:
    with pytest.raises(InvalidRequest, match="need a local folder"):
        resolve_model(name, weights="real", offline=True)


@pytest.mark.parametrize(
    ("files", "index", "words"),
    [
        ((), None, "has no weights"),
        (("adapter_model.safetensors", "training_args.bin"), None, "has no weights"),
        (("model-1.safetensors",), {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, "model-2"),
        (("model-1.safetensors",), {"metadata": {}}, "no weight_map"),
        (("model-1.safetensors",), ["x"], "no weight_map"),
    ],
)
def test_missing_weights_are_said(files: tuple[str, ...], index: Any, words: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, LLAMA, *files)
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest, match=words):
        resolve_model(folder, weights="real")


# Sequence length


def test_sequences_longer_than_the_model_allows_are_refused() -> None:
    source = resolve_model("SmolLM2-135M")
    check_sequence_length(source, 8192)
    with pytest.raises(InvalidRequest, match=r"8,193 is above the 8,192 positions of HuggingFaceTB/SmolLM2-135M"):
        check_sequence_length(source, 8193)


def test_a_config_without_a_limit_allows_any_length() -> None:
    check_sequence_length(ModelSource(name="rwkv", config={"model_type": "rwkv"}), 10**6)


# The hub: the real client against a server of our own, each time in a process whose environment names it


class Hub(BaseHTTPRequestHandler):
    """Speaks what huggingface_hub asks of a hub for one file."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        status, headers, body = 200, {"ETag": '"1"', "X-Repo-Commit": "a" * 40}, json.dumps(LLAMA).encode()
        if "gated" in self.path:
            status, headers, body = 403, {"X-Error-Code": "GatedRepo"}, b""
        elif "missing" in self.path:
            status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b""
        elif "noconfig" in self.path:
            status, headers, body = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}, b""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def resolve_through(endpoint: str, home: Path, name: str, **environment: str) -> list[str]:
    """What was said, and then the model's width or the refusal, from a fresh process."""
    code = (
        "import sys\nfrom autotune.errors import InvalidRequest\nfrom autotune.workload.models import resolve_model\n"
        "try: print(resolve_model(sys.argv[1], say=print).config['hidden_size'])\n"
        "except InvalidRequest as error: print('refused:', error)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key[:3] != "HF_"}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_hub_id_is_downloaded_once_and_said_before(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    first = resolve_through(endpoint, tmp_path, "someone/model")
    assert first == [f"downloading config.json of someone/model from {endpoint}", "576"]
    assert {line.split()[1] for line in asked if "model" in line} == {"/someone/model/resolve/main/config.json"}
    asked.clear()
    assert resolve_through(endpoint, tmp_path, "someone/model") == ["576"]
    assert asked == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/gated", "is gated: accept its licence"),
        ("someone/missing", "nor on the hub"),
        ("someone/noconfig", "could not be downloaded"),
        ("some--one/model", "not known"),
    ],
)
def test_what_the_hub_refuses_is_one_line(name: str, words: str, hub: tuple[str, list[str]], tmp_path: Path) -> None:
    said = resolve_through(hub[0], tmp_path, name)
    assert said[-1].startswith("refused:")
    assert words in said[-1]


def test_offline_asks_nobody(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    (refused,) = resolve_through(endpoint, tmp_path, "someone/model", HF_HUB_OFFLINE="1")
    assert "downloads are off" in refused
    assert asked == []


def test_a_hub_that_does_not_answer_is_said_at_once(tmp_path: Path) -> None:
    (refused,) = resolve_through("http://127.0.0.1:9", tmp_path, "someone/model")
    assert "does not answer" in refused


# Helpers


def refused_with(name: str, words: str) -> str:
    """The refusal: one printable line that holds `words`."""
    with pytest.raises(InvalidRequest) as refusal:
        resolve_model(name, offline=True)
    message = str(refusal.value)
    assert words in message
    assert message.isprintable()
    assert len(message) < 1000
    return message


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions do not hold root back, so its tests run as a user without rights."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
