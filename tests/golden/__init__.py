"""Outputs of the papers' published code, and the values they were made with."""

from pathlib import Path

GOLDEN = Path(__file__).parent
