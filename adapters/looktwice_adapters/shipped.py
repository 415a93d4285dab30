"""The name of a shipped checkpoint -> its folder, the same for serving, measuring and training."""

import os
from pathlib import Path

CHECKOUT_MODELS = Path(__file__).parents[2] / "models"


def shipped_folder(name: str) -> Path | None:
    """The folder of this name under $LOOKTWICE_MODELS, else in the checkout; None without one."""
    named = os.environ.get("LOOKTWICE_MODELS")
    for root in (*((Path(named),) if named else ()), CHECKOUT_MODELS):
        if (root / name / "config.json").is_file():
            return (root / name).resolve()
    return None
