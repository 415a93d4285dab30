"""Dialogues: answers say what the facts say, questions come in many forms, exports are LLaVA's."""

import random
import re
from dataclasses import replace

import pytest

from looktwice_adapters.answers import (
    ONE_PICTURE_TOPICS,
    PLACES,
    Facts,
    answer,
    answer_place,
    answer_several,
    place_named,
    said_yes,
)
from looktwice_adapters.choices import OPTIONS, choose
from looktwice_adapters.dialogue import (
    draw_facts,
    make_dialogue,
    make_series,
    messages,
    picture_prefix,
    to_llava,
)
from looktwice_adapters.evaluate.multiple_choice import chosen_letter
from looktwice_adapters.questions import DEMANDS, TEMPLATES, WORDS, ask, fill, templates
from looktwice_adapters.train.agreement import expected_yes

SCRATCHED = Facts("anomalous", ("bottom left", "center", "bottom left"), "slightly", "bottle")
GOOD = Facts("normal", (), "highly")
UNCLEAR = Facts("undecided", ("top",), "moderately")


def rngs(count: int) -> list[random.Random]:
    return [random.Random(seed) for seed in range(count)]


def test_thousands_of_ways_to_ask_whether_there_is_a_defect():
    rng = random.Random(0)
    asked = {ask(topic, rng) for topic in ("defect", "fine") for _ in range(4000)}
    assert len(asked) > 4000


def test_hundreds_of_held_out_ways_to_ask_which_training_never_uses():
    rng = random.Random(0)
    held_out = {ask(t, rng, "held_out") for t in ("defect", "fine", "where") for _ in range(2000)}
    assert len(held_out) > 1000
    for topic in TEMPLATES:
        assert not set(templates(topic, "train")) & set(templates(topic, "held_out"))
        assert templates(topic, "held_out") or len(TEMPLATES[topic]) < 8


def as_pattern(template: str) -> str:
    """A regular expression for all that a template becomes."""
    marks = {"[": "(?:", "]": ")", "|": "|"}
    return "".join(
        "(?:" + "|".join(map(re.escape, WORDS.get(part[1:-1], ()))) + ")"
        if part.startswith("{")
        else marks.get(part) or re.escape(part)
        for part in re.split(r"(\{\w+\}|[\[\]|])", template)
    )


@pytest.mark.parametrize("topic", [topic for topic in TEMPLATES if topic not in DEMANDS])
def test_no_held_out_question_is_one_that_training_may_ask(topic):
    known = re.compile("|".join(f"(?:{as_pattern(t)})" for t in templates(topic, "train")), re.I)
    assert topic == "place" or known.fullmatch(fill(templates(topic, "train")[0], random.Random(0)))
    for template in templates(topic, "held_out"):
        for rng in rngs(300):
            text = fill(template, rng, place="at the top")
            assert not known.fullmatch(text), template


@pytest.mark.parametrize("topic", TEMPLATES)
def test_every_template_becomes_a_plain_sentence(topic):
    for template in TEMPLATES[topic]:
        for rng in rngs(20):
            text = fill(template, rng, place="at the top", question="Is it OK?")
            assert not re.search(r"[\[\]{}|]|  ", text), template


@pytest.mark.parametrize("topic", ["defect", "fine", "yes_no", "no_yes"])
@pytest.mark.parametrize("facts", [SCRATCHED, GOOD, UNCLEAR, Facts("anomalous", (), stated=False)])
def test_first_word_is_the_verdict(topic, facts):
    for rng in rngs(20):
        assert said_yes(answer(topic, facts, rng)) == expected_yes(topic, facts)


@pytest.mark.parametrize("topic", ONE_PICTURE_TOPICS)
def test_an_answer_names_only_places_of_its_facts_and_the_strongest_first(topic):
    for rng in rngs(300):
        facts = draw_facts(rng, stated=rng.random() < 0.8)
        said = answer(topic, facts, rng)
        names = re.findall(rf"\b(?:{'|'.join(sorted(PLACES, key=len, reverse=True))})\b", said)
        assert names == facts.named[: len(names)]
        assert place_named(said) in (None, *facts.named[:1])
        if facts.verdict == "normal":
            assert place_named(said) is None


def test_numbers_references_and_adverbs_come_from_the_facts():
    for rng in rngs(500):
        facts = draw_facts(rng)
        said = " ".join(answer(topic, facts, rng) for topic in ONE_PICTURE_TOPICS)
        assert set(re.findall(r"(\d+) suspicious", said)) <= {str(len(facts.positions))}
        assert set(re.findall(r"(slightly|moderately|highly)", said)) <= {facts.adverb}
        if facts.reference:
            assert f"the reference {facts.reference}" in said
        else:
            assert "the reference" not in said


def test_of_several_regions_the_strongest_is_named():
    facts = Facts("anomalous", ("top", "left", "top", "right", "bottom"))
    said = answer("count", facts, random.Random(0))
    assert said == "The inspection found 5 suspicious regions, the strongest: top."
    assert "5 regions: top, left, right, bottom." in picture_prefix(facts)


def test_no_place_that_has_a_region_is_denied():
    facts = Facts("anomalous", ("top", "left", "right", "bottom"))
    assert answer_place(facts, "bottom") == "Yes, there is a suspicious region here: bottom."
    assert answer_place(facts, "center").startswith("No. The inspection found 4")


def test_with_defects_everywhere_the_strongest_is_asked_for_among_others():
    facts = Facts("anomalous", tuple(PLACES))
    questions = [choose(facts, rng, topic="where")[0] for rng in rngs(50)]
    assert all(len(re.findall(r"\b[A-D][:.)]", question)) >= 2 for question in questions)


def test_several_pictures_are_answered_one_by_one_under_one_yes_or_no():
    assert answer_several("defect", [GOOD, SCRATCHED]) == (
        "Yes. The first picture is normal. The second picture is anomalous: bottom left."
    )
    assert answer_several("fine", [GOOD, GOOD]).startswith("Yes. The first picture is normal.")
    assert answer_several("which", [GOOD, GOOD]).startswith("None. ")
    assert said_yes(answer_several("defect", [GOOD, UNCLEAR])) is None


def test_the_facts_stand_between_the_picture_and_the_question():
    assert picture_prefix(SCRATCHED) == (
        "<image>Inspection: anomalous, 3 regions: bottom left, center. Reference: bottle.\n"
    )
    assert picture_prefix(Facts("anomalous", (), "highly", stated=False)) == "<image>"


def test_verdict_and_adverb_are_drawn_independently():
    drawn = {(facts.verdict, facts.adverb) for facts in map(draw_facts, rngs(400))}
    assert {(v, a) for v in ("normal", "anomalous") for a in ("slightly", "highly")} <= drawn


def test_a_series_asks_once_about_each_picture():
    dialogue = make_series(random.Random(0))
    assert all(len(turn.pictures) == 1 for turn in dialogue.turns)
    assert len(dialogue.pictures) >= 3
    choices = make_series(random.Random(0), choices=True)
    assert {turn.topic for turn in choices.turns} == {"choice"}
    assert len(choices.pictures) == len(choices.turns) >= 3


def test_conversations_are_the_same_for_the_same_seed_and_alternate():
    for seed in range(50):
        dialogue = make_dialogue(random.Random(seed))
        assert dialogue == make_dialogue(random.Random(seed))
        roles = [message["role"] for message in messages(dialogue) if message["role"] != "system"]
        assert roles == ["user", "assistant"] * len(dialogue.turns)


def test_llava_export_has_one_image_token_for_each_path():
    dialogue = next(d for d in map(make_dialogue, rngs(50)) if len(d.pictures) == 2)
    record = to_llava(dialogue, "a1", ["one.png", "two.png"])
    said = "".join(part["value"] for part in record["conversations"])
    assert said.count("<image>") == 2
    assert record["image"] == ["one.png", "two.png"]
    assert record["conversations"][-1] == {"from": "gpt", "value": dialogue.turns[-1].reply}
    asked = dialogue.turns[0]
    human = next(p["value"] for p in record["conversations"] if p["from"] == "human")
    assert human == "<image>\n" * len(asked.pictures) + asked.question
    with pytest.raises(ValueError, match="2 pictures, but 1 paths"):
        to_llava(dialogue, "a1", ["one.png"])


def chosen(question: str, reply: str) -> str:
    """The words of the option that a reply names."""
    assert re.fullmatch(r"[A-H]\.", reply), (question, reply)
    options = dict(re.findall(r"\b([A-H])[.:)] (.+?)(?=\.|\n| \(?[A-H][.:)]|$)", question))
    return options[reply[0]].strip().lower()


@pytest.mark.parametrize(
    ("topic", "facts", "right"),
    [
        ("defect", SCRATCHED, "yes"),
        ("defect", GOOD, "no"),
        ("fine", SCRATCHED, "no"),
        ("fine", GOOD, "yes"),
    ],
)
def test_the_right_letter_follows_from_the_verdict(topic, facts, right):
    for rng in rngs(40):
        assert chosen(*choose(facts, rng, topic=topic)) == right


def test_a_place_is_answered_in_the_words_of_mmads_options():
    cells = ["Top left", "Top center", "Top right", "Middle left", "Center", "Middle right"]
    cells += ["Bottom left", "Bottom center", "Bottom right"]
    options = {letter: f"{cell}." for letter, cell in zip("ABCDEFGHI", cells, strict=True)}
    for place, letter in zip(PLACES, options, strict=True):
        facts = replace(SCRATCHED, positions=(place,))
        replies = {choose(facts, rng, topic="where")[1] for rng in rngs(20)}
        assert replies == {f"The strongest region is here: {options[letter].lower()}"}
        assert chosen_letter(replies.pop(), options) == letter


def test_the_right_place_is_mostly_among_the_options():
    asked = [choose(SCRATCHED, rng, topic="where")[0].lower() for rng in rngs(80)]
    right = sum(any(words in question for words in OPTIONS["bottom left"]) for question in asked)
    assert 50 < right < 80


def test_a_kind_of_defect_is_never_chosen():
    replies = {choose(SCRATCHED, rng, topic="describe")[1] for rng in rngs(40)}
    assert replies == {"I cannot tell kinds of defects apart."}
