from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from autotune.errors import InvalidRequest
from autotune.recover.job import Event, Job, State
from autotune.recover.notify import check_url, hook_words, keep_url, tell, url_file

WRITE = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps([dict(os.environ), os.getcwd(), sys.argv[2:]]))"


def job(folder: Path, **hooks: tuple[str, ...]) -> Job:
    return Job(
        id=3,
        kind="job",
        name="first",
        state=State.FINISHED,
        command=("x",),
        cwd=str(folder),
        submitted_utc="",
        hooks=hooks,
        environ={"HF_HOME": "/h"},
    )


def test_a_hook_is_told_what_happened_and_no_shell_reads_its_words(tmp_path: Path) -> None:
    told = tmp_path / "told"
    words = (sys.executable, "-c", WRITE, str(told), "$(touch x); *")
    tell(job(tmp_path, finished=words), Event.FINISHED, "3 steps; `date`", home=tmp_path).join(20)
    environ, cwd, rest = json.loads(told.read_text())
    assert (environ["AUTOTUNE_JOB"], environ["AUTOTUNE_JOB_NAME"], environ["HF_HOME"]) == ("3", "first", "/h")
    assert (environ["AUTOTUNE_EVENT"], environ["AUTOTUNE_MESSAGE"]) == ("finished", "3 steps; `date`")
    assert (cwd, rest) == (str(tmp_path), ["$(touch x); *"])


def test_only_the_hook_of_the_event_runs(tmp_path: Path) -> None:
    words = (sys.executable, "-c", WRITE, str(tmp_path / "told"))
    tell(job(tmp_path, failed=words), Event.RECOVERED, "", home=tmp_path).join(20)
    assert not (tmp_path / "told").exists()


def test_a_hook_that_hangs_is_ended_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tell(job(tmp_path, failed=("sleep", "60")), Event.FAILED, "", home=tmp_path, limit_s=0.3).join(20)
    assert time.monotonic() - began < 20
    assert "job 3 (first): the hook on failed took longer than 0 s and was ended" in caplog.text


def test_a_hook_that_fails_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell(job(tmp_path, failed=("false",)), Event.FAILED, "", home=tmp_path).join(20)
    assert "the hook on failed ended with exit code 1" in caplog.text


@pytest.mark.parametrize(("text", "message"), [('mail "me', "mend its quotes"), ("  ", "is empty")])
def test_a_hook_that_is_no_command_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        hook_words(text, "--on-failed")


def test_a_url_is_kept_private_and_forgotten_at_the_end(tmp_path: Path) -> None:
    keep_url(tmp_path, 3, "json://localhost:1/secret")
    path = url_file(tmp_path, 3)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    tell(job(tmp_path), Event.RECOVERED, "", home=tmp_path, limit_s=20).join(30)
    assert path.exists()
    tell(job(tmp_path), Event.FAILED, "", home=tmp_path, limit_s=20).join(30)
    assert not path.exists()


def test_without_apprise_notify_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"pip install 'autotune-qlora\[notify\]'"):
        check_url("json://localhost")


def test_a_url_that_apprise_does_not_know_is_not_repeated() -> None:
    pytest.importorskip("apprise")
    check_url("json://localhost/secret")
    with pytest.raises(InvalidRequest) as caught:
        check_url("nonsense://secret")
    assert "secret" not in str(caught.value)


def test_apprise_brings_the_message_and_the_url_is_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("apprise")
    received: list[dict[str, str]] = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        keep_url(tmp_path, 3, f"json://127.0.0.1:{server.server_port}/secretpath")
        tell(job(tmp_path), Event.RECOVERED, "out of memory at step 12", home=tmp_path).join(40)
        server.shutdown()
    assert [(one["title"], one["message"]) for one in received] == [
        ("autotune: first recovered", "out of memory at step 12")
    ]
    assert "secretpath" not in caplog.text
    assert os.environ.get("AUTOTUNE_EVENT") is None
