"""What a probe said, without what names a person or a machine: paths, UUIDs, host and user name."""

from __future__ import annotations

import contextlib
import functools
import getpass
import re
import socket
from pathlib import Path
from typing import Any

_UUID = re.compile(r"\b(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12})\b", re.IGNORECASE)
_PATH = re.compile(
    r"""
    (?P<url>(?!file:)\b[a-z][a-z0-9+.-]+://\S+)  # left alone
    | (?<=(["']))(?:/|[A-Za-z]:[\\/])[^"'\n]+(?=\2)  # quoted, so it may hold spaces
    | (?<![\w.~/\\])[A-Za-z]:[\\/][^\s"'<>|*?,;]+
    | (?<![\w.~/])(?:file://)?~?/[^\s/"'<>|*?,;:()\[\]]+/[^\s"'<>|*?,;:()\[\]]*
    """,
    re.VERBOSE,
)
_PUBLIC_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "org/name" or "name", as on a model hub
_NOBODY = {"root", "localhost", "user"}


def anonymous(data: Any) -> Any:
    """JSON data with every text in it passed through `anonymous_text`; keys stay."""
    if isinstance(data, str):
        return anonymous_text(data)
    if isinstance(data, list):
        return [anonymous(item) for item in data]
    if isinstance(data, dict):
        return {key: anonymous(item) for key, item in data.items()}
    return data


def anonymous_text(text: str) -> str:
    """Absolute paths cut to what follows site-packages, else to their last part; this machine's names to "…"."""
    text = _PATH.sub(lambda match: match[0] if match["url"] else _short(match[0]), text.replace(*_home()))
    text = _UUID.sub("…", text)
    names = _own_names()
    return names.sub("…", text) if names else text


def public_model_name(name: str) -> str:
    """A model's public id as it is; of a path, the last part that says something."""
    name = name.encode(errors="replace").decode()  # a file name need not be text
    if _PUBLIC_NAME.fullmatch(name) and not name.endswith(".json"):
        return name
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..", "~", "config.json")]
    return parts[-1] if parts else "model"


def _short(path: str) -> str:
    parts = re.split(r"[\\/]+", path.removeprefix("file://").rstrip("\\/"))
    if len(parts) < 2:
        return path
    if len(parts) == 3 and parts[1].lower() in ("home", "users"):
        return "~"  # somebody's home folder: its last part is who
    if "site-packages" in parts:
        return "…/" + "/".join(parts[parts.index("site-packages") + 1 :])
    return f"…/{parts[-1]}"


@functools.cache
def _home() -> tuple[str, str]:
    """This user's home folder, which may hold spaces, and a path without them that stands for it."""
    try:
        home = Path.home()
    except RuntimeError:  # no home folder
        return "~", "~"
    return (str(home), f"{home.anchor}~") if home != Path(home.anchor) else ("~", "~")


@functools.cache
def _own_names() -> re.Pattern[str] | None:
    """Host and user name as whole words. Names of one or two letters would hit words that mean something else."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user without an entry in passwd
        names.add(getpass.getuser())
    words = sorted((name for name in names - _NOBODY if len(name) > 2), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)") if words else None
