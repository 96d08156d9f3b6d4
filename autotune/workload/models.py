"""Which model is meant: a folder, a config.json, a built-in id or a hub id becomes a checked `ModelSource`.

Only the shape is read. No code of a model's is ever run, and neither torch nor transformers is imported here.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.metadata
import importlib.resources
import importlib.util
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from autotune.errors import InvalidRequest, UsageError
from autotune.values import ModelSource

MAX_CONFIG_BYTES = 10_000_000  # the largest real config.json files (label maps) are under 1 MB
NETWORK_TIMEOUT_S = 10.0
LARGEST_SIZE = 10**7  # no published model has a width or a vocabulary near it
LARGEST_CONTEXT = 10**8  # Llama-4-Scout states 10,485,760
LARGEST_COUNT = 10**4  # heads
LARGEST_LAYERS = 1_000  # each becomes modules: 10,000 took a dry run over a minute; no published model has 200
LARGEST_EXPERTS = 4_096  # of a layer
LARGEST_LABELS = 100_000  # transformers makes two entries of each
LARGEST_WINDOW = 2**31  # tokens

# Families name these differently; the first name present is the one meant (GPT-2: n_embd; MPT, OPT: d_model).
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_SIZES = (*_HIDDEN, "intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "head_dim", "vocab_size")
_CONTEXTS = ("max_position_embeddings", "n_positions")
_COUNTS = (*_HEADS, "num_key_value_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")
_WINDOWS = ("sliding_window", "attention_chunk_size")
#: Which numbers a key takes, and how to say so; of nan nothing is true.
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "rope_theta": (lambda n: 0 < n <= 1e30, "above 0 and finite"),
    "rms_norm_eps": (lambda n: 0 <= n <= 1, "from 0 to 1"),
    "layer_norm_eps": (lambda n: 0 <= n <= 1, "from 0 to 1"),
    "layer_norm_epsilon": (lambda n: 0 <= n <= 1, "from 0 to 1"),
    "partial_rotary_factor": (lambda n: 0 <= n <= 1, "from 0 to 1"),
    "attention_dropout": (lambda n: 0 <= n < 1, "at least 0 and below 1"),
}

_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_PATH_LIKE = re.compile(r"[./~\\]|[A-Za-z]:\\|.*\.json$", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A published model whose config.json comes with autotune."""

    id: str
    config: dict[str, Any]
    parameters: int  # as published, tied weights counted once
    parameters_rounded: bool = False  # only a rounded count is published
    source: str = ""  # where config and count come from
    note: str | None = None  # what the user should know: a text tower alone, a left-out quantisation


@functools.cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """The built-in models by public id."""
    text = importlib.resources.files(__package__).joinpath("catalogue.json").read_text(encoding="utf-8")
    return MappingProxyType({entry.id: entry for entry in _entries(json.loads(text))})


def _entries(data: dict[str, dict[str, Any]]) -> Iterator[CatalogueEntry]:
    """Every model, then those that share its shape: `same_shape` holds the config keys in which each differs."""
    for model_id, raw in data.items():
        facts = {key: value for key, value in raw.items() if key not in ("config", "same_shape")}
        yield CatalogueEntry(id=model_id, config=raw["config"], **facts)
        for other, changed in raw.get("same_shape", {}).items():
            yield CatalogueEntry(id=other, config={**raw["config"], **changed}, **facts)


def resolve_model(
    name: str,
    *,
    weights: Literal["random", "real"] = "random",
    offline: bool = False,
    say: Callable[[str], None] | None = None,
) -> ModelSource:
    """The model that `name` means: an existing path, else a built-in id, else a hub id (config.json alone is fetched).

    `say` is told what the user should know, a download before it starts. Raises `InvalidRequest`, one line.
    """
    tell = say or (lambda _message: None)
    path = Path(os.path.expanduser(name))
    if name and _exists(path):
        return _from_path(path, name, weights, tell)
    entry = _find_entry(name)
    if entry is None and (not _HUB_ID.fullmatch(name) or ".." in name):
        raise InvalidRequest(_unknown(name))
    if weights == "real":
        raise InvalidRequest(
            f"real weights of {shown(name)} need a local folder: download it first"
            f" (hf download {shown(name)} --local-dir FOLDER) and give --model FOLDER"
        )
    if entry is None:
        return _from_hub(name, offline, tell)
    if entry.note:
        tell(f"{entry.id}: {entry.note}")
    return ModelSource(name=entry.id, config=copy.deepcopy(entry.config))


def check_sequence_length(source: ModelSource, n: int, *, option: str = "--sequence-length") -> None:
    """Raises `InvalidRequest`, naming the `option` that said so, if `n` tokens are more than the config allows."""
    limit = source.max_positions
    if limit is not None and n > limit:
        raise InvalidRequest(
            f"sequence length {n:,} is above the {limit:,} positions of {shown(source.name)}:"
            f" give {option} {limit} or less"
        )


def check_optimizer(name: str, *, option: str = "--optimizer") -> None:
    """Raises `UsageError`, naming the `option` that said so, for a name that transformers' `TrainingArguments.optim`
    does not know.
    """
    known = _optimizers()
    if known and name not in known:
        near = difflib.get_close_matches(name[:200], known, n=3)
        which = (
            f"the nearest are {', '.join(near)}" if near else "the usual ones are adamw_torch_fused, adamw_8bit, sgd"
        )
        raise UsageError(f"{option} {shown(name)} is not known to transformers {_version()}: {which}")


def shown(name: str) -> str:
    """`name` as one printable line: control characters and broken bytes escaped, cut at 200 characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)
    return text if len(text) <= 200 else text[:199] + "…"


# Paths


def _exists(path: Path) -> bool:
    """True for anything there, a broken link too. Raises `InvalidRequest` where the system does not let us look."""
    try:
        path.lstat()
    except PermissionError as error:
        raise InvalidRequest(f"no permission to look at {shown(str(path))}: check the folders above it") from error
    except (OSError, ValueError):  # not there, too long for a path, or a NUL byte
        return False
    return True


def _from_path(path: Path, name: str, weights: Literal["random", "real"], tell: Callable[[str], None]) -> ModelSource:
    is_folder = os.path.isdir(path)  # false, like os.path.exists, where the system does not let us look
    if not is_folder and path.suffix.lower() != ".json" and os.path.exists(path):
        raise InvalidRequest(f"{shown(name)} is neither a folder nor a .json file: give the folder or its config.json")
    config = _read_config(path / "config.json" if is_folder else path)
    check_config(config, shown(name))
    _check_architecture(config, shown(name), tell)
    folder = None
    if weights == "real":
        folder = str((path if is_folder else path.parent).resolve())
        _check_weights(Path(folder))
    return ModelSource(name=shown(name), config=config, folder=folder, weights=weights)


def _read_config(path: Path) -> Any:
    """The parsed file, whatever JSON it holds."""
    where = shown(str(path))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidRequest(f"{where} is not a file: give a folder with config.json, or a config.json")
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        raise InvalidRequest(_nothing_at(path)) from error
    except PermissionError as error:
        raise InvalidRequest(f"no permission to read {where}: check its access rights") from error
    except OSError as error:
        raise InvalidRequest(f"cannot read {where} ({error.strerror}): give a readable config.json") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{where} is over {MAX_CONFIG_BYTES // 10**6} MB, so it is no model's config.json")
    return _parse(data, where)


def _nothing_at(path: Path) -> str:
    if path.is_symlink():
        return f"{shown(str(path))} is a broken link: it points to {shown(os.readlink(path))}, which is not there"
    folder = shown(str(path.parent))
    if (path.parent / "adapter_config.json").is_file():
        return f"{folder} holds an adapter, not a model: give the folder or id of its base model"
    return f"{folder} has no config.json: give a model's folder, a config.json or an id such as {_example()}"


def _parse(data: bytes, where: str) -> Any:
    if data.startswith(b"version https://git-lfs"):
        raise InvalidRequest(f"{where} is a Git LFS pointer, not the file itself: run git lfs pull")
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = "truncated or damaged" if not text.strip() or text.lstrip().startswith("{") else "not JSON"
        at = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"{where} is {what} ({at}): copy or download it again") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nesting without end
        raise InvalidRequest(f"{where} is not JSON, or damaged: copy or download it again") from error


def _check_weights(folder: Path) -> None:
    """Raises `InvalidRequest` unless every weight file that transformers would load is there."""
    where = shown(str(folder))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            parts = _read_config(folder / index)
            shards = parts.get("weight_map") if isinstance(parts, dict) else None
            if not isinstance(shards, dict):
                raise InvalidRequest(f"{where}/{index} is damaged (no weight_map): download the model again")
            missing = sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()})
            if missing:
                raise InvalidRequest(
                    f"{where} lacks {len(missing)} weight file(s) that its index names, {shown(missing[0])} first:"
                    " finish the download"
                )
            return
    if not any(next(folder.glob(pattern), None) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        raise InvalidRequest(
            f"{where} has no weights (model*.safetensors or pytorch_model*.bin):"
            " give a folder with them, or leave real weights off (memory and speed do not depend on them)"
        )


# Built-in ids


def _find_entry(name: str) -> CatalogueEntry | None:
    """By id, or by the part after the slash; upper and lower case are alike."""
    wanted = name.strip().casefold()
    return _by_name().get(wanted) if wanted else None


@functools.cache
def _by_name() -> dict[str, CatalogueEntry]:
    bare: dict[str, list[CatalogueEntry]] = {}
    for entry in catalogue().values():
        bare.setdefault(entry.id.split("/")[1].casefold(), []).append(entry)
    unique = {name: entries[0] for name, entries in bare.items() if len(entries) == 1}
    return unique | {entry.id.casefold(): entry for entry in catalogue().values()}


def _unknown(name: str, why: str = "") -> str:
    """One line: what was not found, what is near, what works."""
    works = f"give a folder, a config.json, one of {len(catalogue())} built-in ids, or a hub id (owner/name)"
    if _PATH_LIKE.match(name) and not _HUB_ID.fullmatch(name):
        return f"no such file or folder: {shown(name)}; {works}"
    ids = _nearest(name.strip().casefold()[:200])
    nearest = f"; nearest built-in ids: {', '.join(ids)}" if ids else f"; a built-in id is for example {_example()}"
    return f"model {shown(name) or '(empty)'} is not known here{why}{nearest}; {works}, which needs the network"


def _nearest(wanted: str) -> list[str]:
    """Up to three built-in ids: those that hold the name typed, then those spelt alike."""
    tail = wanted.rsplit("/", 1)[-1]
    holding = [known for known in _by_name() if len(tail) > 2 and tail in known]
    alike = difflib.get_close_matches(wanted, list(_by_name()), n=6, cutoff=0.5)
    return list(dict.fromkeys(_by_name()[known].id for known in holding + alike))[:3]


def _example() -> str:
    return next(iter(catalogue()))


# The hub


def _from_hub(name: str, offline: bool, tell: Callable[[str], None]) -> ModelSource:
    """Its config.json from the local hub cache, else downloaded (about a kilobyte)."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
    except (OSError, ValueError) as error:  # ValueError: the hub's own rules for ids
        raise InvalidRequest(_unknown(name)) from error
    if not isinstance(path, str):
        if offline or constants.HF_HUB_OFFLINE:
            raise InvalidRequest(_unknown(name, ", and downloads are off"))
        if not _reaches(constants.ENDPOINT):
            raise InvalidRequest(_unknown(name, f", and {shown(constants.ENDPOINT)} does not answer"))
        tell(f"downloading config.json of {name} from {constants.ENDPOINT}")
        path = _download(name)
    config = _read_config(Path(path))
    check_config(config, name)
    _check_architecture(config, name, tell)
    return ModelSource(name=name, config=config)


def _reaches(endpoint: str) -> bool:
    """Whether the hub answers at all, proxies respected: huggingface_hub alone retries for 23 s without a network."""
    import ssl
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=NETWORK_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; the hub library may know the certificate
    except (OSError, ValueError):
        return False
    return True


def _download(name: str) -> str:
    """Where the file lies now."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    # Transport errors (httpx's or requests', by version) share this parent with HfHubHTTPError.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        return str(hf_hub_download(name, "config.json", etag_timeout=NETWORK_TIMEOUT_S))
    except GatedRepoError as error:
        raise InvalidRequest(
            f"{name} is gated: accept its licence on its page and run hf auth login, or give a local folder"
        ) from error
    except RepositoryNotFoundError as error:
        raise InvalidRequest(_unknown(name, " nor on the hub (or it is private: run hf auth login)")) from error
    except (EntryNotFoundError, transport, OSError, ValueError) as error:
        first = shown(str(error).strip().partition("\n")[0])
        raise InvalidRequest(f"config.json of {name} could not be downloaded ({first}): give a local folder") from error


# What a config may say


def check_config(config: Any, name: str) -> None:
    """Raises `InvalidRequest` for a config that is no model's, or whose sizes cannot be true."""
    name = shown(name)
    if not isinstance(config, dict):
        raise InvalidRequest(f"the config of {name} is not a JSON object: give a model's config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InvalidRequest(f"the config of {name} has no model_type: give a transformers config.json")
    nested = config.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        raise InvalidRequest(f"the text_config of {name} is not a JSON object: give a model's config.json")
    for holder in _objects(config):
        _check_numbers(holder, name)
        _check_labels(holder, name)
    _check_sizes(config, name)
    if nested is not None:
        _check_sizes(nested, f"{name} (text_config)")
    elif not _has_inner_config(config) and not (_first(config, _HIDDEN) and _first(config, _LAYERS)):
        raise InvalidRequest(f"the config of {name} does not say its size (hidden_size, num_hidden_layers)")


def _check_sizes(config: dict[str, Any], name: str) -> None:
    for keys, smallest, largest in (
        (_SIZES, 1, LARGEST_SIZE),
        (_CONTEXTS, 1, LARGEST_CONTEXT),
        (_COUNTS, 1, LARGEST_COUNT),
        (_LAYERS, 1, LARGEST_LAYERS),
        (_EXPERTS, 0, LARGEST_EXPERTS),
        (_WINDOWS, 0, LARGEST_WINDOW),
    ):
        for key in keys:
            _check_whole(config.get(key), key, smallest, largest, name)
    _check_heads(config, name)


def _objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every object in it: transformers builds the inner configs too."""
    waiting = [config]
    while waiting:
        holder = waiting.pop()
        yield holder
        waiting += [value for value in holder.values() if isinstance(value, dict)]


def _check_numbers(config: dict[str, Any], name: str) -> None:
    for key, (is_possible, wanted) in _NUMBERS.items():
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(f"{key} of {name} is {_quoted(value)}, not a number: correct its config.json")
        if not is_possible(value):
            raise InvalidRequest(f"{key} of {name} must be {wanted}, not {_quoted(value)}: correct its config.json")


def _check_labels(config: dict[str, Any], name: str) -> None:
    """A training step uses none, but transformers makes as many as the config says."""
    _check_whole(config.get("num_labels"), "num_labels", 0, LARGEST_LABELS, name)
    for key in ("id2label", "label2id"):
        labels = config.get(key)
        if labels is not None and not isinstance(labels, dict):
            raise InvalidRequest(f"{key} of {name} is {_quoted(labels)}, not an object: correct its config.json")
        _check_whole(len(labels or ()), f"the size of {key}", 0, LARGEST_LABELS, name)


def _check_whole(value: Any, key: str, smallest: int, largest: int, name: str) -> None:
    """A whole number in range, or none. A list has one such number a layer, 0 where the layer has no such part."""
    numbers = value if isinstance(value, list) else [value]
    smallest = 0 if isinstance(value, list) else smallest
    for number in numbers:
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise InvalidRequest(f"{key} of {name} is {_quoted(value)}, not a whole number: correct its config.json")
        if number < smallest or number > largest:
            # Not the number itself: Python refuses to print one of thousands of digits.
            why = f"below {smallest}" if number < smallest else f"above {largest:,}"
            raise InvalidRequest(f"{key} of {name} is {why}, which no model has: correct its config.json")


def _check_heads(config: dict[str, Any], name: str) -> None:
    hidden, heads = _first(config, _HIDDEN), _first(config, _HEADS)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return
    has_own_width = config.get("head_dim") is not None or "qk_nope_head_dim" in config  # the latter: DeepSeek's MLA
    if not has_own_width and hidden % heads:
        raise InvalidRequest(
            f"{heads} heads do not divide hidden_size {hidden} of {name}, and it states no head_dim: correct its config"
        )
    kv_heads = config.get("num_key_value_heads")
    if isinstance(kv_heads, int) and heads % kv_heads:
        raise InvalidRequest(
            f"{kv_heads} key-value heads do not divide the {heads} attention heads of {name}: correct its config.json"
        )


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _has_inner_config(config: dict[str, Any]) -> bool:
    """True where sizes may lie a level down: llm_config, thinker_config, encoder and decoder."""
    return any(isinstance(value, dict) and "model_type" in value for value in config.values())


def _quoted(value: Any) -> str:
    """A value of any size and type in a few characters."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"  # Python refuses to print one of thousands
    return shown(json.dumps(value[:60] if isinstance(value, str) else value))[:40]


# What transformers knows: its mapping files are read as text, since importing them costs seconds


def _check_architecture(config: dict[str, Any], name: str, tell: Callable[[str], None]) -> None:
    """Refuses what plainly cannot be trained as a causal language model; what is unclear is left to the worker."""
    model_type, nested = config["model_type"], config.get("text_config")
    kind = shown(model_type)
    configs = _auto_text("configuration_auto.py") + _auto_text("auto_mappings.py")
    if '"llama"' in configs and not re.search(rf'"{re.escape(model_type)}"[,:]', configs):
        raise InvalidRequest(
            f"transformers {_version()} does not know the model_type {kind} of {name}, and autotune never runs code"
            " from a model folder: upgrade transformers, or choose a model that it knows"
        )
    causal = _mapped("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    inner = nested.get("model_type") if isinstance(nested, dict) else None
    is_unclear = inner is None and (nested is not None or _has_inner_config(config))
    if "llama" in causal and not {model_type, inner} & causal and not is_unclear:
        raise InvalidRequest(f"{name} ({kind}) is not a causal language model: choose one that generates text")
    if config.get("is_encoder_decoder") is True:
        raise InvalidRequest(f"{name} ({kind}) is an encoder-decoder, not a causal language model: choose a decoder")
    if model_type in _mapped("MODEL_FOR_MASKED_LM_MAPPING_NAMES") and config.get("is_decoder") is not True:
        raise InvalidRequest(f"{name} ({kind}) is an encoder, not a causal language model: choose a decoder")
    if isinstance(nested, dict):
        tell(f"{name} is multimodal: its text tower alone is used (text_config)")


def _auto_text(file: str) -> str:
    """A file of transformers.models.auto."""
    return _transformers_text(f"models/auto/{file}")


@functools.cache
def _transformers_text(file: str) -> str:
    """A file of transformers; "" where there is none, and then nothing is refused on its account."""
    try:
        spec = importlib.util.find_spec("transformers")
    except ValueError:
        return ""
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            return Path(folder, file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return ""


@functools.cache
def _mapped(mapping: str) -> frozenset[str]:
    """The model types in one of transformers' auto mappings; empty where its layout is not the one known."""
    block = re.search(rf"^{mapping}\b.*?^\)", _auto_text("modeling_auto.py"), re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r'\(\s*"([^"]+)",', block.group(0))) if block else frozenset()


@functools.cache
def _optimizers() -> frozenset[str]:
    """The values of transformers' `OptimizerNames`; empty where its layout is not the one known."""
    block = re.search(r"^class OptimizerNames\b.*?^(?=\S)", _transformers_text("training_args.py"), re.M | re.S)
    return frozenset(re.findall(r'^    [A-Z0-9_]+ = "([^"]+)"', block.group(0), re.MULTILINE)) if block else frozenset()


def _version() -> str:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
