"""The facts sentence, word for word: the assistant is trained on it."""

import pytest

from looktwice_adapters.facts import THRESHOLD, facts_sentence, verdict_of


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("normal", []), "Inspection: normal, no regions.\n"),
        (("anomalous", ["top"]), "Inspection: anomalous, 1 region: top.\n"),
        (
            ("anomalous", ["bottom left", "center"]),
            "Inspection: anomalous, 2 regions: bottom left, center.\n",
        ),
        (
            ("anomalous", ["top", "left", "top", "right", "center"]),
            "Inspection: anomalous, 5 regions: top, left, right, center.\n",
        ),
        (("anomalous", ["top", "top"]), "Inspection: anomalous, 2 regions: top.\n"),
        (("undecided", []), "Inspection: undecided, no regions.\n"),
        (
            ("undecided", ["top right"], "bottle"),
            "Inspection: undecided, 1 region: top right. Reference: bottle.\n",
        ),
        (
            ("normal", [], "bottle"),
            "Inspection: normal, no regions. Reference: bottle.\n",
        ),
    ],
)
def test_facts_sentence_is_exactly(arguments, sentence):
    assert facts_sentence(*arguments) == sentence


def test_a_score_at_the_threshold_is_anomalous():
    assert verdict_of(THRESHOLD) == "anomalous"
    assert verdict_of(THRESHOLD - 1e-9) == "normal"
