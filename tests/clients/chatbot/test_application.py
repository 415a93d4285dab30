"""The chatbot's web application: who gets in, whose files, what goes out, what is refused."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gradio.utils import get_upload_folder
from httpx import Response
from itsdangerous import TimestampSigner
from starlette.requests import HTTPConnection
from starlette.testclient import TestClient

from looktwice_clients.chatbot import operators
from looktwice_clients.chatbot.application import create
from looktwice_clients.chatbot.database import database_url
from looktwice_clients.chatbot.history import History
from looktwice_clients.chatbot.uploads import KEPT_SECONDS, remove_old
from looktwice_clients.chatbot.wording import wording
from looktwice_clients.errors import DatabaseError
from looktwice_clients.images import MAX_BYTES
from looktwice_clients.inspector import AsyncInspector
from tests.clients.chatbot.rows import inspection
from tests.clients.conftest import encoded, red

KEY = "a key of the plant"


@contextmanager
def running(folder: Path, key: str | None) -> Iterator[TestClient]:
    history = History(database_url(f"sqlite:///{folder}/history.sqlite", folder), folder)
    inspector = AsyncInspector("http://127.0.0.1:9/v1", max_retries=0)
    with TestClient(create(inspector, history, key), headers={"accept": "text/html"}) as client:
        client.app_state["history"] = history
        yield client


@pytest.fixture(scope="module")
def without_key(tmp_path_factory) -> Iterator[TestClient]:
    with running(tmp_path_factory.mktemp("open"), None) as client:
        yield client


@pytest.fixture(scope="module")
def with_key(tmp_path_factory) -> Iterator[TestClient]:
    with running(tmp_path_factory.mktemp("guarded"), KEY) as client:
        yield client


@pytest.fixture
def client(without_key) -> TestClient:
    without_key.cookies.clear()
    return without_key


@pytest.fixture
def guarded(with_key) -> TestClient:
    with_key.cookies.clear()
    return with_key


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(operators, "WRONG_KEY_SECONDS", 0.0)


def test_a_browser_is_led_to_its_language(client):
    reply = client.get("/", headers={"accept-language": "ko-KR,en;q=0.5"})
    assert reply.url.path == "/ko/"
    assert reply.status_code == 200


def test_the_page_names_no_other_host_that_a_browser_would_ask(client):
    for language in ("en", "ko", "de"):
        reply = client.get(f"/{language}/")
        loads = re.findall(r"(?:src|href)=[\"']([^\"']+)", reply.text)
        assert not [address for address in loads if "//" in address]
        styles = client.get(f"/{language}/theme.css").text
        assert "@import" not in styles
        assert not re.findall(r"url\((?![\"']?data:)", styles)
        assert "default-src 'self'" in reply.headers["content-security-policy"]


def test_no_event_is_offered_to_other_programs(client):
    offered = client.get("/en/gradio_api/info").json()
    assert offered == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_a_browser_keeps_its_history_and_sees_nobody_elses(client):
    client.get("/en/")
    mine = client.cookies[operators.OWNER]
    row, other = inspection(owner=mine), inspection(owner="somebody else")
    client.app_state["history"].save(row)
    client.app_state["history"].save(other)
    assert client.get(f"/history/{row.id}.jpg").content == f"jpeg of {mine}".encode()
    assert client.get(f"/history/{other.id}.jpg").status_code == 404
    lines = client.get("/history.csv").text.splitlines()
    assert row.id in lines[1]
    assert len(lines) == 2
    client.cookies.clear()
    client.get("/en/")
    assert client.cookies[operators.OWNER] != mine
    assert client.get(f"/history/{row.id}.jpg").status_code == 404


@pytest.mark.parametrize("forged", ["", "x", "A" * 32, "0" * 31, "' OR 1=1"])
def test_a_cookie_of_another_form_is_replaced(client, forged):
    reply = client.get("/en/", headers={"cookie": f"{operators.OWNER}={forged}"})
    assert re.fullmatch(r"[0-9a-f]{32}", reply.cookies[operators.OWNER])
    assert "HttpOnly" in reply.headers["set-cookie"]


@pytest.mark.parametrize(
    "path",
    ["/", "/en/", "/en/config", "/en/gradio_api/info", "/history.csv", "/history/x.jpg", "/logout"],
)
def test_with_a_key_nothing_is_shown_before_the_login(guarded, path):
    assert guarded.get(path, follow_redirects=False).headers["location"] == "/login"
    assert guarded.get(path, headers={"accept": "*/*"}).status_code == 401
    assert operators.OWNER not in guarded.cookies


@pytest.mark.parametrize("language", ["en", "ko", "de"])
def test_uploads_and_events_are_refused_before_the_login_in_words_that_the_page_shows(
    guarded, language
):
    ended = wording(language)("login.ended")
    for path in ("upload", "queue/join", "queue/data?session_hash=visitor"):
        method = "GET" if "?" in path else "POST"
        address = f"/{language}/gradio_api/{path}"
        reply = guarded.request(method, address, headers={"accept": "*/*"})
        assert (reply.status_code, reply.json()) == (401, {"detail": ended})


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    """Let the time of the logins be so many seconds later."""
    began = time.time()

    def later(seconds: float) -> None:
        monkeypatch.setattr(operators, "time", lambda: began + seconds)
        monkeypatch.setattr(
            TimestampSigner, "get_timestamp", lambda _: int(began + seconds), raising=True
        )

    return later


def test_a_login_ends_twelve_hours_after_it_was_last_used(guarded, clock):
    hour = 3600
    guarded.post("/login", data={"name": "Kim", "key": KEY})
    for path, at in (("/en/config", 11), ("/en/gradio_api/info", 22), ("/en/", 33)):
        clock(at * hour)
        assert guarded.get(path, follow_redirects=False).status_code == 200
    clock(33 * hour + 60)
    assert operators.LOGIN not in guarded.get("/en/").headers.get("set-cookie", "")
    clock(46 * hour)
    assert guarded.get("/en/", follow_redirects=False).status_code == 303


def test_leaving_ends_a_login_that_would_be_renewed(guarded, clock):
    guarded.post("/login", data={"name": "Kim", "key": KEY})
    clock(3600)
    guarded.get("/logout")
    assert guarded.get("/en/", follow_redirects=False).status_code == 303


def test_every_page_renews_the_cookie_of_the_history(client):
    client.get("/en/")
    owner = client.cookies[operators.OWNER]
    [renewed] = client.get("/en/").headers.get_list("set-cookie")
    assert renewed.startswith(f"{operators.OWNER}={owner};")
    assert f"Max-Age={operators.YEAR}" in renewed
    assert "set-cookie" not in client.get("/en/config").headers


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_cookies_of_an_https_page_are_sent_over_https_alone(guarded, scheme):
    form = {"name": "Kim", "key": KEY}
    login = guarded.post(f"{scheme}://testserver/login", data=form, follow_redirects=False)
    ticket = {"cookie": login.headers["set-cookie"].partition(";")[0]}
    page = guarded.get(f"{scheme}://testserver/en/", headers=ticket)
    for reply, name in ((login, operators.LOGIN), (page, operators.OWNER)):
        [cookie] = reply.headers.get_list("set-cookie")
        assert cookie.startswith(f"{name}=")
        assert ("Secure" in cookie) == (scheme == "https")


def test_the_right_key_opens_the_page_until_one_leaves(guarded):
    reply = guarded.post("/login", data={"name": "Kim <b>", "key": KEY})
    assert reply.url.path == "/en/"
    owner = guarded.cookies[operators.OWNER]
    guarded.get("/logout")
    assert guarded.get("/en/", follow_redirects=False).status_code == 303
    assert guarded.cookies[operators.OWNER] == owner


def test_a_login_outlives_the_chatbot_and_ends_with_its_key(guarded):
    guarded.post("/login", data={"name": "Kim <b>", "key": KEY})
    cookie = f"{operators.LOGIN}={guarded.cookies[operators.LOGIN]}"
    browser = HTTPConnection({"type": "http", "headers": [(b"cookie", cookie.encode())]})
    assert operators.logged_in(browser, KEY) == "Kim <b>"
    assert operators.logged_in(browser, "another key of the plant") is None


@pytest.mark.parametrize("wrong", ["", "a key", KEY + " ", "키", "x" * 10_000])
def test_a_wrong_key_is_told_and_opens_nothing(guarded, wrong):
    reply = guarded.post("/login", data={"name": "Kim", "key": wrong})
    assert reply.status_code == 403
    assert 'role="alert"' in reply.text
    assert guarded.get("/en/", follow_redirects=False).status_code == 303


def test_the_login_page_speaks_the_browsers_language(guarded):
    page = guarded.get("/login", headers={"accept-language": "de"}).text
    assert 'lang="de"' in page
    assert "Schlüssel dieses Werks" in page


def test_without_a_key_there_is_no_login(client):
    assert client.get("/login").url.path == "/en/"


def test_a_file_that_is_too_large_is_refused_while_it_arrives(client):

    def parts() -> Iterator[bytes]:
        head = 'content-disposition: form-data; name="files"; filename="a.png"'
        yield f"--x\r\n{head}\r\ncontent-type: image/png\r\n\r\n".encode()
        for _ in range(MAX_BYTES // 1_000_000 + 1):
            yield bytes(1_000_000)
        yield b"\r\n--x--\r\n"

    form = {"content-type": "multipart/form-data; boundary=x"}
    reply = client.post("/en/gradio_api/upload", content=parts(), headers=form)
    assert reply.status_code == 413


def test_a_history_that_is_away_is_told_in_the_browsers_language(client, monkeypatch):
    def away(*_):
        raise DatabaseError("no route to host")

    for name in ("as_csv", "overlay"):
        monkeypatch.setattr(client.app_state["history"], name, away)
    for path in ("/history.csv", "/history/0.jpg"):
        reply = client.get(path, headers={"accept-language": "de"})
        assert reply.status_code == 503
        assert "Datenbank ist nicht erreichbar" in reply.text


WATCHED = """
import json, os, sys, threading, time, urllib.request
asked = []
def watch(event, args):
    if event == "socket.getaddrinfo": asked.append(str(args[0]))
    if event == "socket.connect" and isinstance(args[1], tuple): asked.append(str(args[1][0]))
sys.addaudithook(watch)
port = sys.argv[1]
def visit():
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/en/").read(); break
        except OSError: time.sleep(0.1)
    time.sleep(1)
    print(json.dumps(sorted(set(asked)))); sys.stdout.flush(); os._exit(0)
threading.Thread(target=visit).start()
from looktwice_clients.cli import run
run(["chatbot", "--port", port, "--url", "http://127.0.0.1:9/v1"])
"""


def test_the_chatbot_asks_no_host_but_its_own(tmp_path):
    from tests.serving import free_port

    run = subprocess.run(
        [sys.executable, "-c", WATCHED, str(free_port())],
        capture_output=True,
        text=True,
        env={"XDG_DATA_HOME": str(tmp_path), "PATH": "/usr/bin", "HOME": str(tmp_path)},
        timeout=120,
    )
    asked = json.loads(run.stdout.splitlines()[-1])
    assert set(asked) <= {"127.0.0.1", "None"}, run.stderr


@pytest.mark.parametrize(
    "path",
    ["/etc/hostname", "README.md", "uploads/../../../etc/hostname", "http://127.0.0.1:9/x", 7],
)
def test_no_event_reads_what_was_not_uploaded(client, path):
    for name, others in (("inspect", [""]), ("add", [0.05, False])):
        forged = {"path": path, "meta": {"_type": "gradio.FileData"}, "is_stream": True}
        picture = forged if name == "inspect" else [forged]
        before = [] if name == "inspect" else ["plate"]
        reply = send_event(client, name, [*before, picture, *others])
        assert reply.status_code == 403
    assert client.get(f"/en/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_an_event_with_a_name_that_no_file_has_is_refused(client, path):
    assert send_event(client, "inspect", [{"path": path}, ""]).status_code == 403


@pytest.mark.parametrize("product", ["", "removed from the list meanwhile"])
def test_an_uploaded_file_is_read_whatever_the_product(client, product):
    files = {"files": ("part.png", encoded(red(222)), "image/png")}
    [path] = client.post("/en/gradio_api/upload", files=files).json()
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert send_event(client, "inspect", [picture, product, None]).status_code == 200
    answers = client.get("/en/gradio_api/queue/data?session_hash=visitor").text
    assert "server cannot be reached" in answers  # not Gradio's own words about a list of choices


def test_uploads_of_yesterday_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    assert get_upload_folder() == str(tmp_path)
    old, new = (tmp_path / name / "part.png" for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.touch()
    yesterday = time.time() - KEPT_SECONDS - 1
    os.utime(old, (yesterday, yesterday))
    remove_old()
    assert (old.exists(), new.exists()) == (False, True)
    remove_old()
    assert old.parent.exists()  # changed a moment ago: an upload may be about to write into it
    os.utime(old.parent, (yesterday, yesterday))
    remove_old()
    assert not old.parent.exists()


def test_an_event_that_is_no_event_is_refused(client):
    address = "/en/gradio_api/queue/join"
    assert client.post(address, content=b"{" * 1000).status_code == 400
    assert client.post(address, content=b"[" * 500_000).status_code == 400
    assert client.post(address, content=bytes(2_000_000)).status_code == 413


def send_event(client: TestClient, name: str, data: list[object]) -> Response:
    events = client.get("/en/config").json()["dependencies"]
    [event] = [event for event in events if event["api_name"] == name]
    asked = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "visitor"})
    headers = {"content-type": "application/json"}
    return client.post("/en/gradio_api/queue/join", content=asked, headers=headers)
