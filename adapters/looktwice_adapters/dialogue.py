"""Dialogues: facts about pictures -> conversations that ask about them and answer from them.

The assistant's training text (the part that Anomaly-Instruct plays in Anomaly-OV), made from facts
instead of written by another model: every answer can be checked against its inspection.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from looktwice_adapters.anomaly_prompt import ADVERBS
from looktwice_adapters.answers import (
    ONE_PICTURE_TOPICS,
    PLACES,
    Facts,
    answer,
    answer_place,
    answer_several,
    answer_without_picture,
)
from looktwice_adapters.choices import choose
from looktwice_adapters.facts import Verdict, facts_sentence
from looktwice_adapters.questions import ORDINALS, Split, as_typed, ask

REFERENCES = """bottle cable capsule carpet grid hazelnut leather nut pill screw tile toothbrush
wood transistor zipper cookie pcb1 fabric-blue line3 gearbox_v2 front left_door A7 part-0815 lot42
panel casting weld_seam test my-part top_cover M8 product housing_black cap""".split()
SYSTEMS = [
    "You are a helpful assistant.",
    "You are a quality inspector.",
    "You are an inspection assistant. Answer briefly.",
    "You are a helpful assistant. Answer the user's questions about the picture.",
    "You are an expert in anomaly detection. Be honest and precise.",
    "Answer in English.",
    "You inspect parts on a production line and report defects.",
    "You are LookTwice, an assistant for visual inspection.",
    "Be concise.",
    "You are a chatbot of the plant. Today is Monday. Only answer what you know.",
]
DESCRIBED = 0.5  # share of labelled pictures whose product is described before the first question
# How often each topic about one picture is asked, against 1 for the others.
WEIGHTS = {
    "defect": 9.0,
    "fine": 7.0,
    "where": 4.0,
    "summary": 4.0,
    "yes_no": 5.0,
    "no_yes": 4.0,
    "choice": 6.0,
    "quote": 6.0,
}


@dataclass(frozen=True)
class Turn:
    """A question, with the pictures sent along, and its answer."""

    question: str
    reply: str
    pictures: tuple[Facts, ...] = ()
    topic: str = ""


@dataclass(frozen=True)
class Dialogue:
    """A conversation: turns in order, with the system's words before them or none."""

    turns: tuple[Turn, ...]
    system: str | None = None
    pictures: tuple[Facts, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the turns' pictures in order of appearance."""
        gathered = tuple(facts for turn in self.turns for facts in turn.pictures)
        object.__setattr__(self, "pictures", gathered)


def draw_facts(rng: random.Random, *, stated: bool = True) -> Facts:
    """Made-up facts: any verdict with any adverb, so that neither is guessed from the other.

    Without a facts sentence the verdict follows the adverb and no place is known.
    """
    adverb = rng.choice(ADVERBS)
    if not stated:
        return Facts("normal" if adverb == "slightly" else "anomalous", (), adverb, stated=False)
    verdicts: tuple[Verdict, ...] = ("anomalous", "normal", "undecided")
    verdict = rng.choices(verdicts, (10, 8, 1))[0]
    reference = rng.choice(REFERENCES) if rng.random() < 0.3 else None
    most = {"anomalous": 1, "normal": 0, "undecided": rng.choice((0, 0, 1, 2, 3))}[verdict]
    if verdict == "anomalous" and rng.random() < 0.7:
        most = rng.choice((2, 2, 3, 3, 4, 5, 6, rng.randint(7, 50)))
    positions = tuple(rng.choice(list(PLACES)) for _ in range(most))
    return Facts(verdict, positions, adverb, reference)


def _one_picture_turn(facts: Facts, rng: random.Random, split: Split) -> tuple[str, str, str]:
    names = [*ONE_PICTURE_TOPICS, "place", "choice"]
    if facts.product:  # a label: nobody's confidence, and no reference
        names = [name for name in names if name not in ("confidence", "reference")]
    topic = rng.choices(names, [WEIGHTS.get(name, 1.0) for name in names])[0]
    if topic == "place":
        known = rng.random() < 0.5 and facts.named
        asked = rng.choice(facts.named if known else list(PLACES))
        question = ask("place", rng, split, place=PLACES[asked])
        return topic, question, answer_place(facts, asked)
    if topic == "choice":
        return topic, *choose(facts, rng, split)
    return topic, ask(topic, rng, split), answer(topic, facts, rng)


def described(facts: Facts) -> str:
    """What the product is and should be, as AnomalyGPT puts it in front of a question."""
    should = facts.description or "It should be whole, clean and without any damage."
    return f"This is a picture of this product: {facts.product}. {should}"


def _several_pictures_turn(
    pictures: Sequence[Facts], rng: random.Random, split: Split
) -> tuple[str, str, str]:
    if rng.random() < 0.4:  # about one of them
        index = rng.randrange(len(pictures))
        topic = rng.choice(("defect", "fine", "where", "summary", "severity"))
        noun = f"{ORDINALS[index]} {rng.choice(('picture', 'image', 'one', 'photo'))}"
        question = {
            "defect": rng.choice(("Is there a defect in the {}?", "Is the {} defective?")),
            "fine": rng.choice(("Is the {} OK?", "Is the {} normal?", "Does the {} look good?")),
            "where": rng.choice(("Where is the defect in the {}?", "Where in the {}?")),
            "summary": rng.choice(("What about the {}?", "And the {}?", "Describe the {}.")),
            "severity": "How severe is the defect in the {}?",
        }[topic].format(noun)
        return topic, as_typed(question, rng), answer(topic, pictures[index], rng)
    topic = rng.choice(("defect", "fine", "which", "compare", "summary", "where", "either"))
    return topic, ask(topic, rng, split), answer_several(topic, pictures)


def _small_talk_turn(rng: random.Random, split: Split) -> Turn:
    topic = rng.choice(("greeting", "thanks", "who", "unrelated", *ONE_PICTURE_TOPICS[:6]))
    return Turn(ask(topic, rng, split), answer_without_picture(topic), topic=topic)


def _turns_about(
    pictures: Sequence[Facts], count: int, rng: random.Random, split: Split
) -> list[Turn]:
    """Turns about these pictures, the first of which sends them."""
    turns: list[Turn] = []
    for index in range(count):
        if index and rng.random() < 0.08:
            topic = rng.choice(("greeting", "thanks", "who"))
            question, reply = ask(topic, rng, split), answer(topic, pictures[0], rng)
        elif len(pictures) == 1:
            topic, question, reply = _one_picture_turn(pictures[0], rng, split)
            if not index and pictures[0].product and rng.random() < DESCRIBED:
                question = f"{described(pictures[0])} {question}"
        else:
            topic, question, reply = _several_pictures_turn(pictures, rng, split)
        turns.append(Turn(question, reply, () if index else tuple(pictures), topic))
    return turns


def make_series(rng: random.Random, split: Split = "train", *, choices: bool = False) -> Dialogue:
    """A conversation of one question about each of several pictures, sent one after another.

    Args:
        rng: draws facts and wording.
        split: of the wording.
        choices: whether all of the questions are multiple choice.
    """
    turns: list[Turn] = []
    for _ in range(rng.randint(3, 6)):
        facts = draw_facts(rng, stated=rng.random() < 0.85)
        if choices:
            turns.append(choice_turn(facts, rng, split))
        else:
            turns += _turns_about([facts], 1, rng, split)
    return Dialogue(tuple(turns))


def choice_turn(
    facts: Facts, rng: random.Random, split: Split = "train", topic: str | None = None
) -> Turn:
    """A picture and a multiple-choice question about it."""
    return Turn(*choose(facts, rng, split, topic), (facts,), "choice")


def make_dialogue(
    rng: random.Random, pictures: Sequence[Facts] | None = None, split: Split = "train"
) -> Dialogue:
    """A conversation about pictures; their facts are made up where none are given.

    One picture mostly, now and then several in one message, or one after another, or none at all.
    """
    system = rng.choice(SYSTEMS) if rng.random() < 0.35 else None
    turns: list[Turn] = []
    if pictures is None:
        kind = rng.random()
        if kind < 0.06:
            return Dialogue(tuple(_small_talk_turn(rng, split) for _ in range(2)), system)
        stated = rng.random() < 0.8
        wanted = rng.choice((2, 2, 3, 4)) if kind > 0.85 else 1
        pictures = [draw_facts(rng, stated=stated) for _ in range(wanted)]
    if rng.random() < 0.04:
        turns.append(_small_talk_turn(rng, split))
    if len(pictures) == 2 and rng.random() < 0.5:  # the second one is sent later
        turns += _turns_about(pictures[:1], rng.randint(1, 2), rng, split)
        pictures = pictures[1:]
    turns += _turns_about(pictures, rng.randint(1, 4), rng, split)
    return Dialogue(tuple(turns), system)


def picture_prefix(facts: Facts, image_token: str = "<image>") -> str:
    """What stands before a question for one picture: its token and, where stated, its facts."""
    if not facts.stated:
        return image_token
    return image_token + facts_sentence(facts.verdict, facts.positions, facts.reference)


def user_text(turn: Turn) -> str:
    """A user's message as the prompt carries it: pictures with their facts, then the question."""
    return "".join(picture_prefix(facts) for facts in turn.pictures) + turn.question


def messages(dialogue: Dialogue) -> list[dict[str, str]]:
    """A conversation as the chat template takes it, facts written into the user's messages."""
    out = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    for turn in dialogue.turns:
        out.append({"role": "user", "content": user_text(turn)})
        out.append({"role": "assistant", "content": turn.reply})
    return out


def to_llava(dialogue: Dialogue, identifier: str, images: Sequence[str]) -> dict[str, Any]:
    """A conversation in LLaVA's JSON: one record with `image` paths and `conversations`.

    `facts` has verdict and places of each picture, of which training makes the facts sentence: what
    is said agrees with it. It is null for a defect whose place nobody knows: an inspection always
    has one, and no sentence without a place is ever served.

    Raises:
        ValueError: there is not one path for each picture.
    """
    if len(images) != len(dialogue.pictures):
        raise ValueError(f"{len(dialogue.pictures)} pictures, but {len(images)} paths")
    said = [("system", dialogue.system)] if dialogue.system else []
    for turn in dialogue.turns:
        said += [("human", "<image>\n" * len(turn.pictures) + turn.question), ("gpt", turn.reply)]
    conversations = [{"from": who, "value": what} for who, what in said]
    facts = [
        None
        if facts.verdict == "anomalous" and not facts.positions
        else {"verdict": facts.verdict, "positions": list(facts.positions)}
        for facts in dialogue.pictures
    ]
    return {
        "id": identifier,
        "image": list(images),
        "conversations": conversations,
        "facts": facts,
    }
