"""One run of an evaluation: folders, judges and question files -> rows of results."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import openai

from looktwice_adapters.datasets import Sample
from looktwice_adapters.evaluate.baselines import BaselineError, baseline
from looktwice_adapters.evaluate.chat import Chat, one_line
from looktwice_adapters.evaluate.judge import Judge, ReferencesError, drawn, split
from looktwice_adapters.evaluate.multiple_choice import ask_choices, choice_figures, read_choices
from looktwice_adapters.evaluate.product import Asked, ProductResult, measure, run_product
from looktwice_adapters.evaluate.reasoning import (
    ask_dialogues,
    read_dialogues,
    reasoning_figures,
)
from looktwice_adapters.evaluate.results import Row
from looktwice_adapters.evaluate.server import ServerJudge
from looktwice_adapters.layouts import read_dataset
from looktwice_adapters.train.agreement import said_yes

Products = dict[str, dict[str, tuple[list[Sample], list[Sample]]]]
"""Set -> product -> its references and its test pictures."""


def read_products(
    folders: Sequence[Path], shots: int = 0, limit: int | None = None, seed: int = 0
) -> Products:
    """References and test pictures of every product below the folders.

    Raises:
        ValueError: a folder is not a data set, or a product has too few pictures; one line.
    """
    found: Products = {}
    for root in (path.resolve() for path in folders):
        products = found.setdefault(root.name, {})
        for name, samples in read_dataset(root).items():
            label = name if name == root.name else f"{root.name}/{name}"
            if label in products:
                raise ValueError(f"{root}: there are two products called {label}")
            if not any(sample.split == "test" for sample in samples):
                raise ValueError(f"{root}: {name} has no test pictures")
            named = [replace(sample, product=label) for sample in samples]
            references, test = split(named, shots, seed)
            products[label] = references, drawn(test, limit, seed)
    return found


def judge_row(
    judge: Judge,
    products: Products,
    draws: int,
    ask: Callable[[Sample], Asked] | None = None,
) -> Row:
    """A judge's results on all products, or why it has none; it is closed at the end.

    Args:
        judge: whose figures they are.
        products: as read.
        draws: of the bootstrap.
        ask: whether there is a defect, in words; None to ask nothing.
    """
    sets: dict[str, dict[str, ProductResult]] = {}
    try:
        for set_name, members in products.items():
            for name, (references, test) in members.items():
                cases = run_product(judge, test, references, ask)
                sets.setdefault(set_name, {})[name] = measure(cases, draws)
    except ReferencesError as error:
        return Row(judge.name, problem=str(error))
    finally:
        judge.close()
    return Row(judge.name, sets)


def baseline_row(spec: str, seed: int, products: Products, draws: int) -> Row:
    """A baseline's results, or the row that says why there are none."""
    try:
        return judge_row(baseline(spec, seed), products, draws)
    except BaselineError as error:
        return Row(spec, problem=str(error))
    except openai.APIError as error:
        return Row(spec, problem=one_line(error))


def yes_or_no(url: str, question: str, judge: ServerJudge) -> Callable[[Sample], Asked]:
    """A function that asks the server about a picture, yes meaning a defect.

    The picture is inspected against the references with which the judge inspects it just then.
    """
    chat = Chat(url)

    def ask(sample: Sample) -> Asked:
        options: dict[str, Any] = {}
        if judge.reference:
            options["extra_body"] = {"inspection": {"reference": judge.reference}}
        words = chat.ask(question, [sample], **options)
        return words, said_yes(words)

    return ask


def ask_questions(
    path: Path,
    folder: Path,
    chat: Chat,
    judge: Chat | None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a benchmark's file, and every answer.

    Args:
        path: MMAD's JSON (an object) or VisA-D&R's (a list).
        folder: where the pictures lie that it names.
        chat: who is asked.
        judge: who marks free answers, if anybody.
        limit: at most so many pictures, drawn by seed.
        seed: of the drawing.

    Raises:
        ValueError: the file is not in that shape; one line.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        if isinstance(content, dict):
            choices = read_choices(dict(drawn(list(content.items()), limit, seed)))
            chosen = ask_choices(chat, choices, folder)
            return choice_figures(chosen), [asdict(one) for one in chosen]
        dialogues = read_dialogues(drawn(content, limit, seed))
        replies = ask_dialogues(chat, dialogues, folder, judge)
        return reasoning_figures(replies), [asdict(one) for one in replies]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is neither MMAD's nor VisA-D&R's JSON") from error
