"""`daemon install`: the user unit, and what is left for its owner to do."""

from __future__ import annotations

from collections.abc import Iterator

from autotune.cli.daemon_process import this_home
from autotune.errors import InvalidRequest
from autotune.recover.unit import NAME, config_folder, has_systemd, secrets_path, unit_text, write_unit


def text(share: int) -> str:
    return unit_text(this_home(), share=share)


def install(share: int, *, force: bool) -> Iterator[str]:
    """Write the unit; the lines say what comes next. Raises InvalidRequest where systemd does not run."""
    if not has_systemd():
        raise InvalidRequest(
            "systemd does not run here, so no unit was written: `autotune daemon start` starts the daemon, and so does"
            " a line `@reboot autotune daemon start` in your crontab (--print shows the unit)"
        )
    config = config_folder()
    path = write_unit(text(share), config, force=force)
    yield f"{path} is written. Now:"
    yield f"  systemctl --user daemon-reload && systemctl --user enable --now {NAME}"
    yield "  loginctl enable-linger    # so that it runs from boot on, not from your log-in on"
    yield f"Secrets such as HF_TOKEN=… go into {secrets_path(config)} (chmod 600), one a line."
