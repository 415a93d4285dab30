"""Pins for `pip install` in an image that brings packages: its own versions, the lock's for others.

python docker/constraints.py requirements/cpu.lock > constraints.txt
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)


def constraints(lock: str, installed: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for pip: the installed names and versions, then the lock's that are not installed."""
    pins: dict[str, str] = {}
    for name, version in (*installed, *PIN.findall(lock)):
        pins.setdefault(normalised(name), version)  # of two that are installed the first is used
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    there = [(one.name, one.version) for one in distributions()]
    print("\n".join(constraints(Path(sys.argv[1]).read_text("utf-8"), there)))
