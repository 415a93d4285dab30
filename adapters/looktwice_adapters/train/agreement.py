"""Agreement: an assistant's answers and the facts it was given -> how often they say the same.

Asked in words that training never saw (the held-out templates), with facts drawn at random.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm import tqdm

from looktwice_adapters.answers import Facts, answer, place_named, said_yes
from looktwice_adapters.dialogue import Dialogue, Turn, choice_turn, draw_facts
from looktwice_adapters.questions import ask

YES_NO_TOPICS = ("defect", "fine", "yes_no", "no_yes")
PLACE_TOPICS = ("defect", "fine", "where", "summary", "describe", "advice", "count", "either")


CHOICES = ("defect", "fine")  # answered by a letter


@dataclass
class Agreement:
    """Counts of answers that were checked and that agreed, by what was checked."""

    checked: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, what: str, agreed: bool, *said: str) -> None:
        """Count one check; keep (what, question, answer) of a failed one."""
        self.checked[what] += 1
        self.agreed[what] += agreed
        if not agreed:
            self.wrong.append((what, *said))  # type: ignore[arg-type]

    def shares(self) -> dict[str, float]:
        """Agreed / checked for everything checked."""
        return {what: self.agreed[what] / count for what, count in self.checked.items()}


def expected_yes(topic: str, facts: Facts) -> bool | None:
    """What a yes/no answer must begin with; None where it must be neither."""
    if facts.verdict == "undecided":
        return None
    return (facts.verdict == "anomalous") == (topic in ("defect", "yes_no"))


def check(agreement: Agreement, topic: str, facts: Facts, question: str, said: str) -> None:
    """Compare one answer about one picture with its facts."""
    if topic in YES_NO_TOPICS:
        agreement.note("yes_no", said_yes(said) == expected_yes(topic, facts), question, said)
    if topic in PLACE_TOPICS and facts.verdict == "anomalous" and facts.positions:
        agreement.note("place", place_named(said) == facts.positions[0], question, said)
    if facts.stated:
        rngs = (random.Random(seed) for seed in range(20))
        expected = {answer(topic, facts, rng) for rng in rngs}
        agreement.note("exact", said in expected, question, said)


def held_out_question(rng: random.Random, *, stated: bool) -> Dialogue:
    """One question in words that were held out, about one picture with drawn facts."""
    topic = rng.choice((*YES_NO_TOPICS, *PLACE_TOPICS))
    turn = Turn(ask(topic, rng, "held_out"), "", (draw_facts(rng, stated=stated),), topic)
    return Dialogue((turn,))


def measure(
    reply: Callable[[Turn], tuple[str, bool]], count: int, *, stated: bool = True, seed: int = 0
) -> Agreement:
    """Ask `count` held-out questions and compare the answers with the facts.

    Args:
        reply: answers a turn: its words, and whether they came to an end.
        count: how many questions.
        stated: whether the prompt has the facts sentence (grounding on).
        seed: of questions and facts.
    """
    rng, agreement = random.Random(f"agreement {seed}"), Agreement()
    for _ in tqdm(range(count), desc="agreement", unit="question"):
        (turn,) = held_out_question(rng, stated=stated).turns
        said, ended = reply(turn)
        agreement.note("ended", ended, turn.question, said)
        check(agreement, turn.topic, turn.pictures[0], turn.question, said)
    rng = random.Random(f"agreement, choices {seed}")
    for _ in tqdm(range(count), desc="multiple choice", unit="question"):
        turn = choice_turn(draw_facts(rng, stated=stated), rng, "held_out", rng.choice(CHOICES))
        said, _ = reply(turn)
        agreement.note("choice", said == turn.reply, turn.question, said)
    return agreement
