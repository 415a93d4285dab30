"""One run of an evaluation: folders, judges and question files -> rows of results."""

import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import openai

from looktwice_adapters.answers import said_yes
from looktwice_adapters.datasets import Sample
from looktwice_adapters.evaluate.baselines import baseline, first_line
from looktwice_adapters.evaluate.chat import Chat, one_line
from looktwice_adapters.evaluate.judge import Judge, drawn, split
from looktwice_adapters.evaluate.multiple_choice import (
    Choice,
    Chosen,
    ask_choices,
    choice_figures,
    read_choices,
    with_references,
)
from looktwice_adapters.evaluate.product import Asked, ProductResult, measure, run_product
from looktwice_adapters.evaluate.reasoning import (
    Dialogue,
    Reply,
    ask_dialogues,
    read_dialogues,
    reasoning_figures,
)
from looktwice_adapters.evaluate.results import Row
from looktwice_adapters.evaluate.server import ServerJudge
from looktwice_adapters.layouts import read_dataset

# What says itself what to do. Whatever else ends one judge, or one file of questions, is told with
# its kind; neither ends the run with what it has measured.
EXPECTED = (openai.APIError, ValueError, OSError)
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
        if root.name in found:
            raise ValueError(f"{root}: there are two data sets called {root.name}")
        products = found[root.name] = {}
        for name, samples in read_dataset(root).items():
            label = name if name == root.name else f"{root.name}/{name}"
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
    """A judge's results on all products, or on those before the problem that ended it.

    The judge is closed.

    Args:
        judge: whose figures they are.
        products: as read.
        draws: of the bootstrap.
        ask: whether there is a defect, in words; None to ask nothing.
    """
    sets: dict[str, dict[str, ProductResult]] = {}
    problem = None
    try:
        for set_name, members in products.items():
            for name, (references, test) in members.items():
                cases = run_product(judge, test, references, ask)
                sets.setdefault(set_name, {})[name] = measure(cases, draws)
    except Exception as error:
        problem = in_words(error)
    finally:
        try:
            judge.close()
        except Exception as error:
            problem = problem or in_words(error)
    return Row(judge.name, sets, problem)


def in_words(error: Exception) -> str:
    """An error in one line; $LOOKTWICE_DEBUG also prints the traceback of an unexpected one."""
    if isinstance(error, openai.APIError):
        return one_line(error)
    if isinstance(error, EXPECTED):
        return str(error)
    if os.environ.get("LOOKTWICE_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError):
        return f"it needs {error.name}: pip install 'looktwice[evaluate]'"
    return f"{type(error).__name__}: {first_line(error)}"


def baseline_row(spec: str, seed: int, products: Products, draws: int) -> Row:
    """A baseline's results, or the row that says why there are none."""
    try:
        judge = baseline(spec, seed)
    except Exception as error:
        return Row(spec, problem=in_words(error))
    return judge_row(judge, products, draws)


def told_apart(ours: Row, others: Sequence[Row], specs: Sequence[str]) -> list[Row]:
    """The baselines' rows; behind a name that is not theirs alone stands what was asked for."""
    names = Counter(row.name for row in (ours, *others))
    return [
        replace(row, name=f"{row.name} ({spec})") if names[row.name] > 1 else row
        for row, spec in zip(others, specs, strict=True)
    ]


def yes_or_no(chat: Chat, question: str, judge: ServerJudge) -> Callable[[Sample], Asked]:
    """A function that asks the server about a picture, yes meaning a defect.

    The picture is inspected against the references with which the judge inspects it just then.
    """

    def ask(sample: Sample) -> Asked:
        words = chat.ask(question, [sample], **judge.chat_options)
        return words, said_yes(words)

    return ask


@dataclass(frozen=True)
class Questions:
    """A benchmark's file as it was read."""

    name: str  # the file's
    folder: Path  # where the pictures lie that it names
    choices: Sequence[Choice] = ()  # MMAD's
    dialogues: Sequence[Dialogue] = ()  # or VisA-D&R's


def read_questions(
    path: Path, folder: Path, shots: int = 0, limit: int | None = None, seed: int = 0
) -> Questions:
    """The questions of a benchmark's file, whose pictures are all there.

    Args:
        path: MMAD's JSON (an object) or VisA-D&R's (a list).
        folder: where the pictures lie that it names.
        shots: how many normal pictures each question of MMAD's may be inspected against.
        limit: at most so many pictures, drawn by seed.
        seed: of the drawing.

    Raises:
        ValueError: the file is not in that shape, or a picture is missing; one line.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        if isinstance(content, dict):
            choices = read_choices(dict(drawn(list(content.items()), limit, seed)))
            choices = with_references(choices, folder, shots, seed)
            images = [name for choice in choices for name in (choice.image, *choice.references)]
            read = Questions(path.name, folder, choices=choices)
        else:
            dialogues = read_dialogues(drawn(content, limit, seed))
            images = [dialogue.image for dialogue in dialogues]
            read = Questions(path.name, folder, dialogues=dialogues)
        pictures = [folder / image for image in images]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is neither MMAD's nor VisA-D&R's JSON") from error
    if not pictures:
        raise ValueError(f"{path} holds no question")
    for picture in pictures:
        if not picture.is_file():
            raise ValueError(f"{path}: there is no picture {picture}")
    return read


def ask_questions(
    questions: Questions, chat: Chat, marks: Chat | None, against: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a benchmark's file, and every answer.

    Where a problem ends it, `{"not_run": problem}` stands for the figures, beside the answers
    until then.

    Args:
        questions: as read.
        chat: who is asked.
        marks: who marks free answers, if anybody.
        against: the server's address, where it is to inspect against references.
    """
    chosen: list[Chosen] = []
    replies: list[Reply] = []
    try:
        with nullcontext() if against is None else closing(ServerJudge(against)) as judge:
            if questions.choices:
                chosen.extend(ask_choices(chat, questions.choices, questions.folder, judge))
                figures = choice_figures(chosen)
            else:
                replies.extend(ask_dialogues(chat, questions.dialogues, questions.folder, marks))
                figures = reasoning_figures(replies)
    except Exception as error:
        figures = {"not_run": in_words(error)}
    return figures, [*map(asdict, chosen), *map(asdict, replies)]
