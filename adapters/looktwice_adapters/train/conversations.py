"""Conversations on disk: LLaVA's JSON -> checked conversations about pictures.

The one door for Anomaly-Instruct-125k, for what `looktwice train dialogue` writes, and for users'
own files: `[{"id", "image": path or [paths], "conversations": [{"from": "human"|"gpt"|"system",
"value": text}]}]`, or one such object a line (.jsonl). An <image> in a human's text marks a
picture; the server puts a message's pictures before its text, so only their number matters.
`facts` is ours, and optional: of each picture {"verdict", "positions"} that the answers agree with,
or null where no facts are to be told.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from looktwice_adapters.answers import PLACES
from looktwice_adapters.facts import Verdict, facts_sentence

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
IMAGE = "<image>"


class ConversationError(ValueError):
    """A file of conversations cannot be trained on: which record, and why."""


@dataclass(frozen=True)
class Message:
    """What one side says, with the pictures sent along."""

    role: Role
    text: str
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A conversation: an optional system message, then user and assistant in turn."""

    name: str
    messages: tuple[Message, ...]
    facts: tuple[str, ...] | None = None  # each picture's sentence, or ""; None: the expert's own

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All pictures in order of appearance."""
        return tuple(path for message in self.messages for path in message.pictures)


def read_conversations(path: Path, images: Path | None = None) -> list[Conversation]:
    """All conversations of a file.

    Args:
        path: a .json list of records, or .jsonl with one a line.
        images: the folder that the records' picture paths start from; the file's own by default.

    Raises:
        ConversationError: the file or a record of it is not as it should be, or a picture is
            missing.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConversationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise ConversationError(f"{path} holds no list of conversations")
    folder = images or path.parent
    return [
        _conversation(record, f"record {number} of {path}", folder)
        for number, record in enumerate(records)
    ]


def _conversation(record: Any, where: str, folder: Path) -> Conversation:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ConversationError(f"{where} has no list `conversations`")
    paths = record.get("image") or []
    names = paths if isinstance(paths, list) else [paths]
    if not all(isinstance(name, str) for name in names):
        raise ConversationError(f"{where} has an `image` that is neither a path nor a list of them")
    pictures = [folder / name for name in names]
    if missing := [path for path in pictures if not path.is_file()]:
        raise ConversationError(f"{where}: no picture at {missing[0]}")
    parts = [_said(part, where) for part in record["conversations"]]
    marked = sum(text.count(IMAGE) for _, text in parts)
    if marked not in (0, len(pictures)):
        raise ConversationError(f"{where} has {len(pictures)} pictures, but {marked} times {IMAGE}")
    messages, queue = [], list(pictures)
    for role, text in parts:
        if role != "user" and IMAGE in text:
            raise ConversationError(f"{where}: only a human's message can carry {IMAGE}")
        # Records without marks mean their pictures to come first.
        count = text.count(IMAGE) if marked or role != "user" else len(queue)
        plain = text.replace(f"{IMAGE}\n", "").replace(f"\n{IMAGE}", "").replace(IMAGE, "")
        messages.append(Message(role, plain.strip(), tuple(queue[:count])))
        del queue[:count]
    _check_turns([message.role for message in messages], where)
    if silent := [m for m in messages if m.role == "assistant" and not m.text]:
        raise ConversationError(f"{where} has {len(silent)} empty answers")
    facts = _facts(record.get("facts"), len(pictures), where)
    return Conversation(str(record.get("id", where)), tuple(messages), facts)


def _facts(entries: Any, pictures: int, where: str) -> tuple[str, ...] | None:
    if entries is None:
        return None
    try:
        if len(entries) != pictures:
            raise ConversationError(f"{where} has {pictures} pictures, but {len(entries)} `facts`")
        if unknown := {e["verdict"] for e in entries if e} - set(get_args(Verdict)):
            raise ConversationError(f"{where} has `facts` with the verdict {unknown.pop()!r}")
        places = [e["positions"] for e in entries if e]
        if not all(isinstance(named, list) and PLACES.keys() >= set(named) for named in places):
            known = ", ".join(PLACES)
            raise ConversationError(f"{where} has `facts` whose positions are no list of: {known}")
        return tuple(facts_sentence(e["verdict"], e["positions"]) if e else "" for e in entries)
    except (KeyError, TypeError) as error:
        raise ConversationError(f"{where} has `facts` without verdict and positions") from error


def _said(part: Any, where: str) -> tuple[Role, str]:
    if not isinstance(part, dict) or not isinstance(part.get("value"), str):
        raise ConversationError(f"{where} has a message without a text `value`")
    if part.get("from") not in ROLES:
        raise ConversationError(
            f"{where} has a message from {part.get('from')!r}, not human or gpt"
        )
    return ROLES[part["from"]], part["value"]


def _check_turns(roles: Iterable[Role], where: str) -> None:
    spoken = [role for role in roles if role != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ConversationError(f"{where}: human and gpt must speak in turn, gpt last")
