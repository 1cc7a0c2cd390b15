"""The page of a line and its token: from a file it is never shown, and stays over restarts."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="extra serve is not installed")

from lpvit_edge.dashboard_cli import announce
from tests.broker import free_port
from tests.line_bundle import make_bundle
from tests.test_line import ROOT

TOKEN = "a-token-of-the-tests-0123456789"


def run(tmp_path: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    (tmp_path / "in").mkdir(exist_ok=True)
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    return subprocess.Popen(
        [
            sys.executable, "-m", "lpvit_edge", "run", str(tmp_path / "bundle"),
            "--source", f"folder:{tmp_path / 'in'}", "--policy", "wait",
            "--state", str(tmp_path / "state"), *options,
        ],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def status(port: int, token: str) -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_the_token_of_a_file_is_asked_for_and_not_printed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "token").write_text(TOKEN + "\n")
    port = free_port()
    page = ("--dashboard", f"0.0.0.0:{port}", "--token-file", str(tmp_path / "token"))
    process = run(tmp_path, *page)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line == f"dashboard: http://0.0.0.0:{port}\n"
        assert (status(port, TOKEN), status(port, TOKEN + "x")) == (200, 401)
    finally:
        process.terminate()
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert TOKEN not in out + errors


def test_a_token_file_without_a_page_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    process = run(tmp_path, "--token-file", "token")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "give --dashboard host:port too" in errors


def test_a_token_that_was_made_up_is_shown_to_a_person_and_not_to_the_system_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    announce("http://h", TOKEN)
    assert TOKEN in capsys.readouterr().err
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    announce("http://h", TOKEN)
    said = capsys.readouterr().err
    assert TOKEN not in said
    assert "--token-file" in said
