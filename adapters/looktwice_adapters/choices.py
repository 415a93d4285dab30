"""Multiple choice: facts about a picture -> a question with lettered options and its answer.

The form of MMAD (ICLR 2025): an instruction, the question, the options. Yes or no is answered by
the letter that follows from the facts, a place in MMAD's words for it, whatever the options are: to
find one place's letter among several is more than the small model learns, and a wrong letter would
contradict the facts. Where the facts tell nothing, the answer says so.
"""

import random

from looktwice_adapters.answers import PLACES, Facts
from looktwice_adapters.questions import CONTEXTS, Split, ask, fill

LETTERS = "ABCDEFGH"
INSTRUCTIONS = [
    "Answer with the option's letter from the given choices directly.",
    "Answer with the letter of the right option.",
    "You are an industrial inspector who checks products by images. Answer with the letter.",
    "Choose the [right|correct|best] [option|answer]. [Only the letter|Answer with its letter].",
    "Which option is [right|correct]? Reply with one letter.",
    "Please select the correct answer from the options.",
    "This is a multiple choice question. Give the letter.",
    "Pick one of the options[ below|].",
]
MARKS = ["{}. ", "{}. ", "{}: ", "{}) ", "({}) "]
OPTIONS = {  # what an option for a place may say
    "top left": ["top left", "upper left"],
    "top": ["top", "top center", "top middle", "upper center"],
    "top right": ["top right", "upper right"],
    "left": ["left", "middle left", "center left"],
    "center": ["center", "middle", "in the center"],
    "right": ["right", "middle right", "center right"],
    "bottom left": ["bottom left", "lower left"],
    "bottom": ["bottom", "bottom center", "bottom middle", "lower center"],
    "bottom right": ["bottom right", "lower right"],
}
CELLS = {  # what MMAD calls a place
    "top": "top center",
    "left": "middle left",
    "right": "middle right",
    "bottom": "bottom center",
}
KINDS = (
    "broken piece,water stain,loose wire,missing screw,colour fading,wrong label,burn mark,scratch,"
    "crack,dent,hole,contamination,bent part,cut,fold,misplaced part,print error,rust"
).split(",")


def _places(facts: Facts, rng: random.Random) -> list[str]:
    """Options for "where"; the right one is mostly among them."""
    others = [place for place in PLACES if place not in facts.named]
    if len(others) < 2:  # defects nearly everywhere: only the strongest is right
        others = [place for place in PLACES if place != facts.here]
    places = rng.sample(others, min(len(others), rng.choice((2, 3, 3, 3))))
    if facts.positions and rng.random() < 0.85:
        places.append(facts.here)
    rng.shuffle(places)
    return [rng.choice(OPTIONS[place]) for place in places]


TOPICS = {"defect": 4, "fine": 2, "where": 4, "describe": 1}  # how often each is asked


def choose(
    facts: Facts, rng: random.Random, split: Split = "train", topic: str | None = None
) -> tuple[str, str]:
    """A multiple-choice question about one picture, and the answer that the facts give."""
    topic = topic or rng.choices(list(TOPICS), list(TOPICS.values()))[0]
    right: int | None = None
    if topic in ("defect", "fine"):
        options = ["yes", "no"] if rng.random() < 0.5 else ["no", "yes"]
        if facts.verdict != "undecided":
            wanted = "yes" if (facts.verdict == "anomalous") == (topic == "defect") else "no"
            right = options.index(wanted)
    elif topic == "where":
        options = _places(facts, rng)
    else:
        options = rng.sample(KINDS, rng.choice((3, 4, 4)))
        if facts.kind:  # a label tells it
            if facts.kind not in options:
                options[rng.randrange(len(options))] = facts.kind
            right = options.index(facts.kind)
    if rng.random() < 0.9:
        options = [option.capitalize() for option in options]
    stop = "." if rng.random() < 0.7 else ""
    mark = rng.choice(MARKS)
    listed = [
        f"{mark.format(letter)}{option}{stop}"
        for letter, option in zip(LETTERS, options, strict=False)
    ]
    instruction = fill(rng.choice(INSTRUCTIONS), rng)
    claim = "There is a defect in the object. " if topic in ("where", "describe") else ""
    if rng.random() < 0.25:
        claim = fill(rng.choice(CONTEXTS), rng) + claim
    question = claim * (rng.random() < 0.5) + ask(topic, rng, split)
    question = rng.choice(("Question: ", "", "")) + question
    lines = [question, rng.choice(("\n", "\n", " ")).join(listed)]
    lines.insert(rng.choice((0, 2)), instruction)
    return "\n".join(lines), _reply(topic, facts, right)


def _reply(topic: str, facts: Facts, right: int | None) -> str:
    """The right letter or place, or why there is none."""
    if right is not None:
        return f"{LETTERS[right]}."
    if facts.verdict == "undecided":
        return "The inspection is undecided about this picture."
    if facts.verdict == "normal":
        return "None of these. The inspection found nothing unusual."
    if topic == "describe":
        return "I cannot tell kinds of defects apart."
    if not facts.positions:
        known = "Nobody marked its place." if facts.kind else "The anomaly map shows it."
        return f"I do not know where. {known}"
    return f"The strongest region is here: {CELLS.get(facts.here, facts.here)}."
