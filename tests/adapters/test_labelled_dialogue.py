"""Conversations about labelled pictures: answers say what label and mask say, and come back in."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.answers import ONE_PICTURE_TOPICS, Facts, answer
from looktwice_adapters.choices import choose
from looktwice_adapters.dialogue import described, make_dialogue
from looktwice_adapters.train.conversations import read_conversations
from looktwice_adapters.train.labelled_dialogue import facts_of_label
from looktwice_clients.cli import run as looktwice
from tests.adapters.test_train_expert_command import write_set


def marked(*boxes):
    mask = np.zeros((90, 90), bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_places_counts_and_extent_come_from_the_mask():
    facts = facts_of_label("metal_nut", "bent_edge", marked((5, 5, 25, 25), (40, 70, 50, 80)))
    assert facts.positions == ("top left", "right")  # the deeper one first
    assert facts.area == pytest.approx(500 / 8100)
    rng = random.Random(0)
    assert "2 suspicious regions" in answer("count", facts, rng)
    assert "6.2 % of the picture" in answer("severity", facts, rng)
    assert "bent edge" in answer("kind", facts, rng)
    assert "metal nut" in answer("picture", facts, rng)


def test_a_ring_lies_where_its_material_is_and_not_in_its_hole():
    ring = marked((10, 10, 80, 80)) & ~marked((14, 14, 76, 60))
    (place,) = facts_of_label("washer", "rust", ring).positions
    assert place.endswith("right")


def test_nothing_is_said_that_the_label_does_not_know():
    unmarked = facts_of_label("cable", "cut", None)
    good = facts_of_label("cable", "good", None)
    for topic in ONE_PICTURE_TOPICS:
        if topic == "confidence":
            continue
        for seed in range(10):
            said = answer(topic, unmarked, random.Random(seed))
            assert "%" not in said
            assert not any(word in said for word in ("top", "left", "slightly", "highly", "map"))
            assert "cut" not in answer(topic, good, random.Random(seed))


def test_the_product_is_described_before_some_first_questions():
    facts = facts_of_label("cable", "good", None, "Three wires, all insulated.")
    openings = [make_dialogue(random.Random(seed), [facts]).turns for seed in range(60)]
    told = [
        (bool(turn.pictures), "Three wires, all insulated." in turn.question)
        for turns in openings
        for turn in turns
    ]
    assert 10 < sum(said for first, said in told if first) < 50
    assert not any(said for first, said in told if not first)
    assert "bottle" in described(Facts(product="bottle"))


def test_what_is_written_goes_through_the_door_of_training(tmp_path):
    plates = write_set(tmp_path / "plates")
    (tmp_path / "described.json").write_text('{"plates": "Grey and even."}')
    options = ["--count", "4", "--data", str(plates), "--out", str(tmp_path / "out")]
    options += ["--descriptions", str(tmp_path / "described.json")]
    assert looktwice(["train", "dialogue", *options]) == 0
    path = tmp_path / "out" / "conversations.json"
    conversations = read_conversations(path)
    assert len(conversations) == 4 + 9
    assert all(len(conversation.pictures) == 1 for conversation in conversations)
    first = path.read_text()
    assert looktwice(["train", "dialogue", *options]) == 0
    assert path.read_text() == first
    with Image.open(conversations[0].pictures[0]) as picture:
        assert min(picture.size) >= 100
    assert "Inspection: " not in first
    assert len(json.loads(first)) == 13
    by_picture = {one.pictures[0].parent.name: one for one in conversations if one.facts}
    assert by_picture["good"].facts == ("Inspection: normal, no regions.\n",)
    assert by_picture["square"].facts[0].startswith("Inspection: anomalous, 1 region: ")


def test_a_defect_that_nobody_marked_has_no_facts_to_tell(tmp_path):
    unmarked = write_set(tmp_path / "unmarked", masks=False)
    options = ["--count", "0", "--data", str(unmarked), "--out", str(tmp_path / "out")]
    assert looktwice(["train", "dialogue", *options]) == 0
    conversations = read_conversations(tmp_path / "out" / "conversations.json")
    told = {one.facts for one in conversations if one.pictures[0].parent.name == "square"}
    assert told == {("",)}


def test_nothing_to_talk_about_is_refused(tmp_path, capsys):
    assert looktwice(["train", "dialogue", "--count", "0", "--out", str(tmp_path)]) == 2
    assert "give --count or --data" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["scratch", "long_scratch"])
def test_a_choice_about_a_labelled_defect_says_what_the_label_knows(kind):
    scratched = facts_of_label("plate", kind, None)
    for seed in range(40):
        question, reply = choose(scratched, random.Random(seed), topic="describe")
        chosen = re.search(rf"(?<![A-Za-z]){reply[0]}[).:]+ ?(\w+ ?\w*)", question)
        assert chosen is not None, question
        assert chosen[1].lower().startswith(scratched.kind)
        assert choose(scratched, random.Random(seed), topic="where")[1] == (
            "I do not know where. Nobody marked its place."
        )
