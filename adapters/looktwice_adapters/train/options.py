"""What a run was made with and what one is asked for -> the names that differ."""

from typing import Any


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names whose values differ, or that only one side knows."""
    return [
        name
        for name in then | now
        if name not in then or name not in now or then[name] != now[name]
    ]
