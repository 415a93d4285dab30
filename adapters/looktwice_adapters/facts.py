"""Facts sentence: verdict, places and reference -> the line that stands behind an image.

The principle of this project, "facts from code, words from the model": the server puts this line
into the user's message, the assistant is trained on it, and answers repeat it.
"""

from collections.abc import Sequence
from typing import Literal

Verdict = Literal["normal", "anomalous", "undecided"]
THRESHOLD = 0.5  # of a calibrated score, and of a calibrated map


def verdict_of(score: float) -> Verdict:
    """What a calibrated score says by itself; a reference gives the verdict with the score."""
    return "anomalous" if score >= THRESHOLD else "normal"


def facts_sentence(verdict: Verdict, positions: Sequence[str], reference: str | None = None) -> str:
    """One line of facts about one image, ending with a newline.

    Args:
        verdict: "normal", "anomalous" or "undecided".
        positions: place of every region, highest score first; each place is named once, all of
            them: of a place that is not named the assistant says that nothing was found there.
        reference: name of the reference the image was compared with.
    """
    count = len(positions)
    if not count:
        regions = "no regions"
    else:
        named = ", ".join(dict.fromkeys(positions))
        regions = f"{count} region{'s' if count > 1 else ''}: {named}"
    compared = f" Reference: {reference}." if reference else ""
    return f"Inspection: {verdict}, {regions}.{compared}\n"
