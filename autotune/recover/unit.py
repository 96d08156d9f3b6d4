"""The daemon as a systemd user unit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from autotune.errors import InvalidRequest

NAME = "autotune.service"

#: KillMode: a stop or an upgrade ends the daemon alone; supervisors go on, and the next daemon finds them.
#: OOMPolicy: the kernel's out-of-memory kill of a trainer is ours to recover from, not a reason to stop the unit.
_UNIT = """\
[Unit]
Description=autotune: a queue of supervised training runs
Documentation=man:systemd.service(5)

[Service]
Type=notify
NotifyAccess=main
ExecStart={start}
Environment={home}
EnvironmentFile=-{secrets}
WatchdogSec=180
Restart=on-failure
RestartSec=5
TimeoutStopSec=90
KillMode=process
OOMPolicy=continue
TasksMax=infinity

[Install]
WantedBy=default.target
"""


def unit_text(home: Path, *, share: int = 1, python: str = sys.executable, config: Path | None = None) -> str:
    """The unit that serves `home`."""
    words = [python, "-P", "-m", "autotune.cli.main", "daemon", "start", "--foreground"]
    words += ["--share", str(share)] if share > 1 else []
    secrets = str(secrets_path(config or config_folder())).replace("%", "%%")
    start = " ".join(_quoted(word, dollar=True) for word in words)
    return _UNIT.format(start=start, home=_quoted(f"AUTOTUNE_HOME={home}"), secrets=secrets)


def _quoted(word: str, *, dollar: bool = False) -> str:
    """As systemd.syntax(7) and systemd.service(5) read it; only ExecStart expands variables."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    text = text.replace("$", "$$") if dollar else text
    return text if text and not any(c in text for c in " \t'\";\\") else f'"{text}"'


def config_folder(environ: Mapping[str, str] = os.environ) -> Path:
    stated = environ.get("XDG_CONFIG_HOME", "")
    return Path(stated) if stated.startswith("/") else Path.home() / ".config"


def unit_path(config: Path) -> Path:
    return config / "systemd" / "user" / NAME


def secrets_path(config: Path) -> Path:
    """Variables such as HF_TOKEN for the daemon and all that it starts; the user's own file."""
    return config / "autotune" / "environment"


def write_unit(text: str, config: Path, *, force: bool) -> Path:
    """Raises InvalidRequest where another text is there and `force` is not given, OSError."""
    path = unit_path(config)
    if path.exists() and path.read_text(encoding="utf-8") != text and not force:
        raise InvalidRequest(f"{path} is there and says something else: --force replaces it, --print shows the new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{NAME}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    return path


def has_systemd() -> bool:
    """Whether systemd runs this machine, as sd_booted(3) finds out, and can be spoken to."""
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None
