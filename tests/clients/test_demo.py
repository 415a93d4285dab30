import runpy
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from looktwice_clients import demo
from looktwice_clients.errors import DemoError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_example_pictures_are_what_their_script_draws() -> None:
    drawn = runpy.run_path(str(EXAMPLES / "make_pictures.py"))
    for name, function in (("good.png", "good_part"), ("scratched.png", "scratched_part")):
        with Image.open(EXAMPLES / name) as committed:
            difference = ImageChops.difference(committed, drawn[function]())
        # Pillow's versions may round differently.
        assert max(high for _, high in difference.getextrema()) <= 2


def test_the_two_examples_differ_in_the_scratch_alone() -> None:
    good, scratched = (Image.open(EXAMPLES / name) for name in demo.PICTURES)
    left, top, right, bottom = ImageChops.difference(good, scratched).getbbox()
    assert 0 < right - left < 0.25 * good.width
    assert 0 < bottom - top < 0.3 * good.height
    assert good.width // 2 < left


def test_a_server_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    code = "print('\\n'.join(map(str, range(30)))); print('no such model'); raise SystemExit(3)"
    with log.open("wb") as output:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=output)
    with pytest.raises(DemoError) as caught:
        demo.wait_until_ready(server, f"http://127.0.0.1:{demo.free_port()}/health", log)
    words = str(caught.value).splitlines()
    assert words[0] == "the server ended with code 3"
    assert words[1:] == [f"  | {line}" for line in [*range(16, 30), "no such model"]]


def test_a_server_that_ignores_sigterm_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STOP_SECONDS", 0.5)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); "
    server = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert server.stdout is not None
    server.stdout.readline()
    demo.stop(server)
    server.stdout.close()
    assert server.returncode == -9
    assert "did not stop in 0 s: killed" in capfd.readouterr().err


def test_a_server_is_waited_for_and_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    port = demo.free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    (tmp_path / "health").write_text("")
    demo.wait_until_ready(server, f"http://127.0.0.1:{port}/health", tmp_path / "log")
    demo.stop(server)
    assert server.returncode is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
    assert "server ready after" in capfd.readouterr().out


def test_outside_a_checkout_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")  # the demo sets it; put back after the test
    assert demo.main() == 1
    assert "good.png is missing: run the demo from a checkout" in capsys.readouterr().err
