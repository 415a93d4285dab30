"""Multiple-choice questions in MMAD's JSON (Jiang et al., ICLR 2025) -> accuracy per subtask.

Each question is asked by itself, with the picture, which LookTwice's server may inspect against
normal ones, where MMAD shows these to the model. Departs from its script: an answer that names no
option counts as wrong, where MMAD leaves it out.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from looktwice_adapters.datasets import NORMAL, read_product
from looktwice_adapters.evaluate.chat import Chat, picture
from looktwice_adapters.evaluate.judge import drawn
from looktwice_adapters.evaluate.server import ServerJudge

DETECTION = "Anomaly Detection"
# MMAD counts these two with Object Analysis.
SUBTASK = {"Object Structure": "Object Analysis", "Object Details": "Object Analysis"}
INSTRUCTION = (
    "You are an industrial inspector who checks products by images. Answer with the option's "
    "letter from the given choices directly."
)
# A letter by itself: at a line's end, before a mark such as Markdown's, or in "B is correct".
_LETTER = re.compile(
    r"[\W_]*(?:(?:the|correct|best|answer|option|choice|is)[\W_]+)*([a-z])"
    r"(?:\s*(?:[]).:,;!}>]|$)|[*_`\"]|'(?!\w)|\s+is\b(?!\s+(?:not|wrong|incorrect|false)\b))",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Choice:
    """One question about one picture."""

    image: str  # path inside the benchmark's folder, as its JSON has it
    subtask: str
    question: str
    options: dict[str, str]  # letter -> text
    answer: str  # letter
    references: tuple[str, ...] = ()  # normal pictures of the product, paths as above

    @property
    def dataset(self) -> str:
        """The data set that the picture is from: its path's first folder."""
        return PurePosixPath(self.image).parts[0]

    @property
    def normal(self) -> bool:
        """Whether the picture is a normal one: its folder is called good."""
        return NORMAL in PurePosixPath(self.image).parts


@dataclass(frozen=True)
class Chosen:
    """A question with what the model said."""

    choice: Choice
    said: str
    letter: str | None  # None: names no option

    @property
    def right(self) -> bool:
        """Whether it names the right option."""
        return self.letter == self.choice.answer


def read_choices(content: dict[str, Any]) -> list[Choice]:
    """The questions of an MMAD file: picture -> {"conversation": [...]}.

    Raises:
        ValueError: a question lacks a key, or its answer is not an option.
    """
    choices = []
    for image, entry in content.items():
        key = next((name for name in entry if name.startswith("conversation")), None)
        for asked in entry[key] if key else ():
            missing = [name for name in ("Question", "Options", "Answer") if name not in asked]
            if missing:
                raise ValueError(f"{image}: a question without {missing[0]}")
            if asked["Answer"] not in asked["Options"]:
                raise ValueError(f"{image}: the answer {asked['Answer']!r} is not an option")
            kind = asked.get("type", "Question")
            subtask = SUBTASK.get(kind, kind)
            named = tuple(entry.get("random_templates", ()))
            choices.append(
                Choice(image, subtask, asked["Question"], asked["Options"], asked["Answer"], named)
            )
    return choices


def with_references(choices: Sequence[Choice], folder: Path, shots: int, seed: int) -> list[Choice]:
    """The questions with at most `shots` references each, as many as there are.

    The first that the file names, as in MMAD's own runs. Where it names none, some are drawn by
    seed from the product's `train/good`, or without one from `test/good`, if nothing is asked about
    them.
    """
    asked = {choice.image for choice in choices}

    @cache
    def of_product(product: PurePosixPath) -> tuple[str, ...]:
        normal = [sample for sample in read_product(folder / product) if not sample.anomalous]
        train = [sample for sample in normal if sample.split == "train"]
        names = [str(product / s.path.relative_to(folder / product)) for s in train or normal]
        return tuple(drawn([name for name in names if name not in asked], shots, seed))

    found = []
    for choice in choices:
        parts = PurePosixPath(choice.image).parts
        chosen = choice.references[:shots]
        if shots and not chosen and "test" in parts:
            chosen = of_product(PurePosixPath(*parts[: parts.index("test")]))
        found.append(replace(choice, references=chosen))
    return found


def ask_choices(
    chat: Chat, choices: Sequence[Choice], folder: Path, judge: ServerJudge | None = None
) -> Iterator[Chosen]:
    """Ask every question, its picture being below `folder`; what was said of each as it comes.

    With a `judge` the server, LookTwice's, inspects each picture against the question's references.
    """
    asked = tqdm(choices, "questions", unit="question", leave=False, disable=None)
    for references, group in groupby(asked, lambda choice: choice.references):
        if judge is not None:
            judge.prepare("questions", [picture(folder / name) for name in references])
        for choice in group:
            options = "\n".join(f"{letter}. {text}" for letter, text in choice.options.items())
            said = chat.ask(
                f"{INSTRUCTION}\nQuestion: {choice.question}\n{options}",
                [picture(folder / choice.image)],
                **(judge.chat_options if judge else {}),
            )
            yield Chosen(choice, said, chosen_letter(said, choice.options))


def chosen_letter(said: str, options: dict[str, str]) -> str | None:
    """The option that an answer names: by its letter, else by its words, else by most of them.

    "It is at the right" names "Middle right" where no other option has a word of it.
    """
    letter = _LETTER.match(said)
    if letter and letter[1].upper() in options:
        return letter[1].upper()
    words = {key: _plain(text) for key, text in options.items()}
    plain = _plain(said)
    found = {key: re.search(rf"\b{re.escape(text)}\b", plain) for key, text in words.items()}
    places = {key: match.start() for key, match in found.items() if match}
    if places:
        # The first that is named; of two at one place the longer, "top left" before "top".
        return min(places, key=lambda key: (places[key], -len(words[key])))
    spoken = set(plain.split())
    shares = {key: len(spoken & set(t.split())) / len(t.split()) for key, t in words.items() if t}
    best = [key for key, share in shares.items() if share == max(shares.values()) > 0]
    return best[0] if len(best) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def choice_figures(chosen: Sequence[Chosen]) -> dict[str, Any]:
    """Accuracy per data set and subtask, their means, chance, and how many answers name nothing.

    As in MMAD, detection is the mean of the accuracies on normal and on anomalous pictures, a
    subtask's figure the mean over data sets, and the average the mean over subtasks.
    """
    subtasks = dict.fromkeys(one.choice.subtask for one in chosen)
    datasets = dict.fromkeys(one.choice.dataset for one in chosen)
    table = {
        dataset: {
            subtask: _accuracy(rows, subtask)
            for subtask in subtasks
            if (rows := _of(chosen, dataset, subtask))
        }
        for dataset in datasets
    }
    by_subtask = {
        subtask: {
            "accuracy": float(np.mean([row[subtask] for row in table.values() if subtask in row])),
            "chance": float(np.mean([1 / len(one.choice.options) for one in rows])),
            "questions": len(rows),
        }
        for subtask in subtasks
        if (rows := [one for one in chosen if one.choice.subtask == subtask])
    }
    return {
        "kind": "multiple choice",
        "average": float(np.mean([row["accuracy"] for row in by_subtask.values()])),
        "subtasks": by_subtask,
        "datasets": table,
        "questions": len(chosen),
        "with_references": sum(bool(one.choice.references) for one in chosen),
        "unreadable": sum(one.letter is None for one in chosen),
    }


def _of(chosen: Sequence[Chosen], dataset: str, subtask: str) -> list[Chosen]:
    return [o for o in chosen if (o.choice.dataset, o.choice.subtask) == (dataset, subtask)]


def _accuracy(rows: Sequence[Chosen], subtask: str) -> float:
    groups = [rows]
    if subtask == DETECTION:
        groups = [[o for o in rows if o.choice.normal is normal] for normal in (True, False)]
    return float(np.mean([np.mean([one.right for one in group]) for group in groups if group]))
