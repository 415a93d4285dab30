"""`looktwice chatbot`: wrong usage is one line and an exit code."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import uvicorn

from looktwice_clients.chatbot import command
from looktwice_clients.cli import run


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("LOOKTWICE_DATABASE", "LOOKTWICE_CHATBOT_KEY"):
        monkeypatch.delenv(name, raising=False)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("key", ["short", " \n"])
def test_a_key_that_is_too_short_is_refused(key, capsys):
    assert run(["chatbot", "--key", key]) == 2
    assert "at least 8 characters" in complaint(capsys)


def test_an_address_that_is_taken_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["chatbot", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen on 127.0.0.1" in complaint(capsys)


def test_another_kind_of_database_is_refused(capsys):
    assert run(["chatbot", "--port", "0", "--database", "mysql://kim:secret@h/x"]) == 1
    said = complaint(capsys)
    assert "postgresql://" in said
    assert "secret" not in said


def test_a_database_that_is_away_is_refused(capsys):
    address = "postgresql://kim:secret@127.0.0.1:1/x"
    assert run(["chatbot", "--port", "0", "--database", address]) == 1
    said = complaint(capsys)
    assert "cannot open the database postgresql+psycopg://kim:***@127.0.0.1:1/x" in said
    assert "secret" not in said


def test_the_data_folder_that_cannot_be_made_is_named(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert run(["chatbot", "--port", "0"]) == 1
    assert str(tmp_path / "file") in complaint(capsys)


def test_an_ipv6_address_is_told_in_brackets(capsys, monkeypatch):
    monkeypatch.setattr(command, "free_port", lambda host, port: port)
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    assert run(["chatbot", "--host", "::1"]) == 0
    assert capsys.readouterr().out.startswith("http://[::1]:7860/ ")


def test_a_chatbot_that_is_told_to_stop_ends_under_an_open_page_and_leaves_no_pictures(tmp_path):
    arguments = [sys.executable, "-m", "looktwice_clients", "chatbot", "--port", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as chatbot:
        try:
            address = chatbot.stdout.readline().split()[0].rstrip("/")
            assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", address)
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            assert list(tmp_path.glob("looktwice-chatbot-*"))
            # What every open page holds on to.
            heartbeat = f"{address}/en/gradio_api/heartbeat/visitor"
            with urllib.request.urlopen(heartbeat, timeout=20) as page:
                assert page.readline() == b"data: ALIVE\n"
                chatbot.send_signal(signal.SIGTERM)
                assert chatbot.wait(30) == 0
        finally:
            chatbot.kill()
    assert not list(tmp_path.glob("looktwice-chatbot-*"))
