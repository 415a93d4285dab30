"""A server watched from outside: the same command in a child, all its processes ended with it.

vLLM alone ends as if all were well (exit code 0) when one of its processes was killed, passes over
a SIGTERM that comes while it starts, waits without end for a client whose answer it gave up, and
leaves its workers behind when it is killed itself.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

CHILD_OF = "LOOKTWICE_CHILD_OF"  # in the child's environment: its parent's process id
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.5
REPEAT_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def is_child() -> bool:
    """Whether this process is the one that serves."""
    return os.environ.get(CHILD_OF) == str(os.getppid())


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is killed; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(grace: float) -> int | None:
    """Run this process's own command as a child until it ends.

    The first Ctrl-C or SIGTERM ends the child in order, the second one at once.

    Args:
        grace: seconds that the child has to end in order before it is killed.

    Returns:
        0 where the end was asked for, the child's exit code where it gave one that says what went
        wrong, else None.
    """
    asked: list[float] = []

    def pass_on(_number: int, _frame: object) -> None:
        asked.append(time.monotonic())
        if len(asked) > 1:
            _kill(child)
        child.send_signal(signal.SIGTERM)

    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {CHILD_OF: str(os.getpid())},
        start_new_session=True,  # a terminal's Ctrl-C comes here only
    )
    heard = set(ENDINGS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup's
        heard.remove(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = _wait(child, asked, grace)
    finally:
        _kill(child)
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return 0
    return code if code > 0 else None


def _wait(child: subprocess.Popen[bytes], asked: list[float], grace: float) -> int:
    """The child's exit code, once it has ended or time is up."""
    repeated = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_SECONDS)
        waited = time.monotonic() - asked[0] if asked else 0.0
        if waited > grace:
            _kill(child)
        elif waited > REPEAT_SECONDS * (repeated + 1):
            # While vLLM starts, it passes over the first signal; later, over all but the first.
            child.send_signal(signal.SIGTERM)
            repeated += 1


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's processes."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
