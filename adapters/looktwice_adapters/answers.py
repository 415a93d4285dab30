"""Answers: a topic and the facts about the pictures -> words that say just these facts.

Nothing is invented: verdict, places, counts, adverb and reference come from the inspection, and
what an inspection does not tell (kinds of defects, names of parts) the answers leave open. The last
functions read an answer back.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from looktwice_adapters.anomaly_prompt import Adverb
from looktwice_adapters.facts import Verdict, facts_sentence
from looktwice_adapters.questions import ORDINALS

# In questions; answers list places as the facts sentence does.
PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
_PLACE = re.compile(r"\b(" + "|".join(sorted(PLACES, key=len, reverse=True)) + r")\b")
UNDECIDED = "The inspection is undecided about this picture."


@dataclass(frozen=True)
class Facts:
    """What an inspection says about one picture.

    `positions` has one place for every region, highest score first; `stated` is false where the
    prompt carries the adverb alone (no facts sentence). A label knows more than an inspection:
    product, kind and area (share of the picture) of the defect; they are None where nobody does.
    """

    verdict: Verdict = "normal"
    positions: tuple[str, ...] = ()
    adverb: Adverb = "slightly"
    reference: str | None = None
    stated: bool = True
    product: str | None = None
    kind: str | None = None
    area: float | None = None
    description: str | None = None  # what the product should look like

    @property
    def named(self) -> list[str]:
        """The places that the facts sentence names."""
        return list(dict.fromkeys(self.positions))

    @property
    def here(self) -> str:
        """The place of the strongest region."""
        return self.positions[0]


def finding(facts: Facts) -> str:
    """One sentence that says what was found, whatever the verdict."""
    if facts.verdict == "normal":
        return "The inspection found nothing unusual."
    if facts.verdict == "undecided":
        if facts.positions:
            return f"{UNDECIDED} The most suspicious place: {facts.here}."
        return UNDECIDED
    if not facts.positions:
        if facts.kind:
            return f"The part has a defect: {facts.kind}."
        return f"The features of the picture are {facts.adverb} suspicious."
    count = len(facts.positions)
    if count == 1:
        return f"The inspection found 1 suspicious region: {facts.here}."
    return f"The inspection found {count} suspicious regions, the strongest: {facts.here}."


def _defect(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "undecided":
        return finding(facts)
    if facts.verdict == "normal":
        other = "the picture looks normal."
        return rng.choice((f"No. {finding(facts)}", f"No, {other}"))
    if facts.positions and rng.random() < 0.3:
        return f"Yes, something is wrong here: {facts.here}."
    return f"Yes. {finding(facts)}"


def _fine(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "undecided":
        return finding(facts)
    if facts.verdict == "normal":
        return rng.choice((f"Yes. {finding(facts)}", "Yes, the picture looks normal."))
    if facts.positions and rng.random() < 0.3:
        return f"No, something is wrong here: {facts.here}."
    return f"No. {finding(facts)}"


def _either(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "undecided":
        return finding(facts)
    return f"The verdict is {facts.verdict}. {finding(facts)}"


def _unmarked(facts: Facts) -> str:
    """Who knows the place of a defect without a position."""
    return "Nobody marked its place." if facts.kind else "The anomaly map shows where."


def _where(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "Nowhere. The inspection found nothing unusual."
    if facts.verdict == "undecided":
        return finding(facts)
    if not facts.positions:
        return f"{finding(facts)} {_unmarked(facts)}"
    if len(facts.positions) == 1:
        return f"The suspicious region is here: {facts.here}."
    return f"The strongest of the suspicious regions is here: {facts.here}."


def _count(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "None. The inspection found nothing unusual."
    if facts.verdict == "anomalous" and not facts.positions:
        return f"I do not know how many. {finding(facts)}"
    return finding(facts)


def _named_kind(facts: Facts) -> str:
    return f"The kind of defect is: {facts.kind}."


def _describe(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "There is no defect to describe. The inspection found nothing unusual."
    if facts.kind:
        return f"{finding(facts)} {_named_kind(facts)}"
    return f"{finding(facts)} It does not tell what kind of defect it is."


def _severity(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "There is no defect to rate. The inspection found nothing unusual."
    if facts.verdict == "undecided":
        return finding(facts)
    if facts.area is not None:
        return f"The defect covers {100 * facts.area:.1f} % of the picture. {finding(facts)}"
    if facts.kind:
        return f"Nobody measured how large it is. {finding(facts)}"
    return f"The features are {facts.adverb} suspicious. The verdict is anomalous."


def _confidence(facts: Facts, rng: random.Random) -> str:
    return (
        f"The verdict is {facts.verdict}, and the features are {facts.adverb} suspicious. "
        "The exact score stands in the inspection beside this answer."
    )


def _advice(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "Nothing needs to be done. The inspection found nothing unusual."
    if facts.verdict == "undecided":
        return f"{UNDECIDED} Take another picture, or let a person decide."
    if not facts.positions:
        return "Set the part aside and let a person check it."
    return f"Set the part aside and check it here: {facts.here}."


def _reference(facts: Facts, rng: random.Random) -> str:
    if facts.reference:
        return f"The picture was compared with the reference {facts.reference}."
    return "The picture was not compared with a reference."


def _picture(facts: Facts, rng: random.Random) -> str:
    if facts.product:
        return f"The picture shows this product: {facts.product}. {finding(facts)}"
    return f"I cannot name what a picture shows, I only report its inspection. {finding(facts)}"


def _summary(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "undecided":
        return finding(facts)
    return f"The picture is {facts.verdict}. {finding(facts)}"


def _quote(facts: Facts, rng: random.Random) -> str:
    if not facts.stated:
        return finding(facts)
    return facts_sentence(facts.verdict, facts.positions, facts.reference).strip()


def _why(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "Because nothing in the picture stands out."
    if facts.verdict == "undecided":
        return f"{UNDECIDED} It could not judge it safely."
    against = f"the reference {facts.reference}" if facts.reference else "a normal part"
    if not facts.positions:
        if facts.kind:
            return f"Because it has this defect: {facts.kind}."
        return f"Because its features are {facts.adverb} suspicious."
    return f"Because this region does not look like {against}: {facts.here}."


def _kind(facts: Facts, rng: random.Random) -> str:
    if facts.verdict == "normal":
        return "No. The inspection found nothing unusual."
    if facts.kind:
        return f"{_named_kind(facts)} {finding(facts)}"
    return f"I cannot tell kinds of defects apart. {finding(facts)}"


def _yes_no(facts: Facts, rng: random.Random) -> str:
    return {"normal": "No.", "anomalous": "Yes."}.get(facts.verdict, "Undecided.")


def _no_yes(facts: Facts, rng: random.Random) -> str:
    return {"normal": "Yes.", "anomalous": "No."}.get(facts.verdict, "Undecided.")


def _one_word(facts: Facts, rng: random.Random) -> str:
    return f"{facts.verdict.capitalize()}."


def _unrelated(facts: Facts, rng: random.Random) -> str:
    return f"I can only talk about the inspection of pictures. {finding(facts)}"


# Topics about one picture. Those of _SMALL_TALK need none.
_TOPICS = {
    "defect": _defect,
    "fine": _fine,
    "either": _either,
    "where": _where,
    "count": _count,
    "describe": _describe,
    "severity": _severity,
    "confidence": _confidence,
    "advice": _advice,
    "reference": _reference,
    "picture": _picture,
    "summary": _summary,
    "quote": _quote,
    "why": _why,
    "kind": _kind,
    "yes_no": _yes_no,
    "no_yes": _no_yes,
    "one_word": _one_word,
    "unrelated": _unrelated,
}
_SMALL_TALK = {
    "greeting": "Hello. Send me a picture of a part, and I tell you what its inspection says.",
    "thanks": "You are welcome.",
    "who": "I am LookTwice, an inspection assistant. "
    "I tell you whether the inspection of a picture found a defect, and where.",
}
NO_PICTURE = "There is no picture in this conversation. Please send me one."
NO_PICTURE_UNRELATED = "I can only talk about the inspection of pictures. Please send me one."
ONE_PICTURE_TOPICS = tuple(_TOPICS)


def answer(topic: str, facts: Facts, rng: random.Random) -> str:
    """The answer to a question of this topic about one picture."""
    if topic in _SMALL_TALK:
        return _SMALL_TALK[topic]
    return _TOPICS[topic](facts, rng)


def answer_without_picture(topic: str) -> str:
    """The answer where the conversation has no picture yet."""
    if topic in _SMALL_TALK:
        return _SMALL_TALK[topic]
    return NO_PICTURE_UNRELATED if topic == "unrelated" else NO_PICTURE


def answer_place(facts: Facts, asked: str) -> str:
    """The answer to "is there a defect <place>?"."""
    if facts.verdict == "undecided":
        return finding(facts)
    if facts.verdict == "normal":
        return "No. The inspection found nothing unusual."
    if not facts.positions:
        return f"{finding(facts)} {_unmarked(facts)}"
    if asked in facts.named:
        return f"Yes, there is a suspicious region here: {asked}."
    return f"No. {finding(facts)}"


def _about(ordinal: str, facts: Facts) -> str:
    where = f": {facts.here}" if facts.verdict == "anomalous" and facts.positions else ""
    return f"The {ordinal} picture is {facts.verdict}{where}."


def answer_several(topic: str, pictures: Sequence[Facts]) -> str:
    """The answer to a question about all of several pictures.

    Yes/no topics and "which" begin with the verdict over all: anomalous if any picture is, else
    undecided if any is, else normal.
    """
    each = " ".join(
        _about(ordinal, facts) for ordinal, facts in zip(ORDINALS, pictures, strict=False)
    )
    verdicts = [facts.verdict for facts in pictures]
    worst = next(v for v in ("anomalous", "undecided", "normal") if v in (*verdicts, "normal"))
    opening = {
        "defect": {"anomalous": "Yes. ", "normal": "No. "},
        "fine": {"anomalous": "No. ", "normal": "Yes. "},
        "which": {"normal": "None. "},
        "where": {"normal": "Nowhere. "},
    }
    return opening.get(topic, {}).get(worst, "") + each


def said_yes(text: str) -> bool | None:
    """Whether an answer begins with Yes (True) or No (False); None for anything else."""
    first = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if first is None else first[1].lower() == "yes"


def place_named(text: str) -> str | None:
    """The first of the nine places that an answer names."""
    found = _PLACE.search(text.lower())
    return found[1] if found else None
