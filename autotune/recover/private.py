"""What is nobody else's business: files that others can write, variables and words that carry a secret."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.errors import InvalidRequest, StoreError

#: Variables of the submitting shell that a job keeps: what decides which program runs and where it finds its files.
_KEPT = frozenset({"PATH", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_HOME", "LANG", "LC_ALL", "TZ"})
_KEPT_PREFIXES = ("AUTOTUNE_", "CONDA_", "HF_", "OMP_", "NCCL_", "PYTORCH_", "TOKENIZERS_", "TRANSFORMERS_", "WANDB_")
_OWN = frozenset({"AUTOTUNE_HOME", "AUTOTUNE_PLAN"})  # set for each run anew

_SECRET_VARIABLE = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|AUTH|NOTIFY", re.IGNORECASE)
_SECRET_OPTION = re.compile(  # a trainer's --eos_token is none
    r"(^|[_-])((hub|hf|auth|access|api|bearer|refresh|wandb|git\w*)[_-]?token|(api|access|secret|private)[_-]?key"
    r"|secret|password|passwd|passphrase|credentials?)$|^-*(token|key)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}"
    r"|xox[abprs]-[\w-]{10,}|https://(hooks\.slack|discord(app)?)\.com/\S+"
    r"|[a-z][a-z0-9+.-]*://[^\s/@:]+:[^\s/@]+@\S+)"
)
_OPTION = re.compile(r"(--?[A-Za-z][\w.-]*|[A-Za-z_]\w*)=(.+)", re.DOTALL)


def check_private(*paths: Path) -> None:
    """Raises StoreError for a file or folder whose owner is somebody else or that others can write."""
    for path in paths:
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue
        if hasattr(os, "geteuid") and facts.st_uid != os.geteuid():
            raise StoreError(
                f"{path} belongs to another user (uid {facts.st_uid}), who could make autotune run their commands:"
                " point AUTOTUNE_HOME at a folder of yours"
            )
        if os.name == "posix" and facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise StoreError(
                f"{path} can be written by others, who could make autotune run their commands:"
                f" chmod go-w {shlex.quote(str(path))}"
            )


def kept_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that go with a job into its row. Secrets do not: they come from the daemon's own environment."""
    return {
        name: value
        for name, value in environ.items()
        if (name in _KEPT or name.startswith(_KEPT_PREFIXES))
        and name not in _OWN
        and not _SECRET_VARIABLE.search(name)
        and not _SECRET_VALUE.search(value)
    }


def secret_words(words: Sequence[str]) -> tuple[int, ...]:
    """Positions of the words that carry a secret's value: `--hub_token X`, `--api-key=X`, `hf_…`."""
    found = {number for number, word in enumerate(words) if _SECRET_VALUE.search(word)}
    for number, word in enumerate(words):
        pair = _OPTION.fullmatch(word)
        if pair and _SECRET_OPTION.search(pair[1]):
            found.add(number)
        follows = number + 1 < len(words) and not words[number + 1].startswith("-")
        if not pair and follows and word.startswith("-") and _SECRET_OPTION.search(word):
            found.add(number + 1)
    return tuple(sorted(found))


def masked(words: Sequence[str]) -> tuple[str, ...]:
    """The words with secrets as "…", to keep or to print."""
    secret = set(secret_words(words))
    return tuple(_mask(word) if number in secret else word for number, word in enumerate(words))


def without_secrets(data: Any) -> Any:
    """JSON data in which what looks like a token, or a URL with a password, is "…"."""
    if isinstance(data, str):
        return _SECRET_VALUE.sub("…", data)
    if isinstance(data, list | tuple):
        return [without_secrets(item) for item in data]
    if isinstance(data, dict):
        return {key: without_secrets(item) for key, item in data.items()}
    return data


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises InvalidRequest where a command that is to be kept carries a secret."""
    if found := secret_words(words):
        first = found[0]
        name = words[first].partition("=")[0] if _OPTION.fullmatch(words[first]) else words[max(0, first - 1)]
        raise InvalidRequest(
            f"a queued command is kept in jobs.db, and this one carries a secret (near {name}): leave it out, and give"
            " it as a variable such as HF_TOKEN in the daemon's environment (`autotune daemon install` says where)"
        )


def _mask(word: str) -> str:
    pair = _OPTION.fullmatch(word)
    return f"{pair[1]}=…" if pair else "…"
