"""A supervised command in processes of its own, without a server in it."""

import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import sys, time
from looktwice_server.supervisor import is_child, supervise
if is_child():
    print("up", flush=True)
    time.sleep(60)
sys.exit(supervise(1.0))
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def start(ignored):
        return subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, ignored),
        )

    return start


@pytest.mark.parametrize(("ignored", "ends"), [(signal.SIG_IGN, False), (signal.SIG_DFL, True)])
def test_a_closed_terminal_ends_the_command_unless_nohup_said_no(command, ignored, ends):
    process = command(ignored)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0 if ends else 1)
    if not ends:
        assert process.poll() is None
        process.terminate()
    assert process.wait(20) == 0
