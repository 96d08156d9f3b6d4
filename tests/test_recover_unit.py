from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from autotune.errors import InvalidRequest
from autotune.recover.systemd import Notifier
from autotune.recover.unit import config_folder, unit_path, unit_text, write_unit


def lines(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_the_unit_starts_the_daemon_of_this_home() -> None:
    unit = lines(unit_text(Path("/data/home"), share=2, python="/venv/bin/python", config=Path("/c")))
    assert shlex.split(unit["ExecStart"])[:4] == ["/venv/bin/python", "-P", "-m", "autotune.cli.main"]
    assert shlex.split(unit["ExecStart"])[4:] == ["daemon", "start", "--foreground", "--share", "2"]
    assert unit["Environment"] == "AUTOTUNE_HOME=/data/home"
    assert unit["EnvironmentFile"] == "-/c/autotune/environment"


def test_supervisors_outlive_the_unit_and_an_oom_kill_does_not_stop_it() -> None:
    unit = lines(unit_text(Path("/h")))
    assert (unit["Type"], unit["KillMode"], unit["OOMPolicy"]) == ("notify", "process", "continue")


def test_odd_paths_are_quoted_as_systemd_reads_them() -> None:
    unit = lines(unit_text(Path("/a b/50%"), python='/p "x"/$HOME/python'))
    assert unit["Environment"] == '"AUTOTUNE_HOME=/a b/50%%"'
    assert unit["ExecStart"].startswith('"/p \\"x\\"/$$HOME/python" -P ')


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "autotune.service"
    path.write_text(unit_text(tmp_path / "a home"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "autotune.service" in line] == []


def test_another_unit_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = write_unit("one", tmp_path, force=False)
    assert path == unit_path(tmp_path)
    write_unit("one", tmp_path, force=False)
    with pytest.raises(InvalidRequest, match="--force replaces it"):
        write_unit("two", tmp_path, force=False)
    assert write_unit("two", tmp_path, force=True).read_text() == "two"


def test_a_relative_config_folder_is_ignored_as_xdg_wants() -> None:
    assert config_folder({"XDG_CONFIG_HOME": "/x"}) == Path("/x")
    assert config_folder({"XDG_CONFIG_HOME": "x"}) == Path.home() / ".config"


def test_the_notifier_speaks_to_systemd_and_keeps_its_watchdog_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(str(tmp_path / "socket"))
        service.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "socket"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        notifier = Notifier()
        notifier.say("READY=1")
        notifier.alive()
        notifier.alive()  # not again so soon
        notifier.say("STOPPING=1")
        assert [service.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
        notifier.close()


def test_without_systemd_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    notifier.say("READY=1")
    notifier.alive()
