"""Sequences: a dialogue -> token ids, slots for its pictures' embeddings, supervised labels.

The layout is the server's: the chat template, and behind each picture its anomaly prompt and its
facts. A slot is an <image> token whose embedding a picture's feature takes.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from looktwice_adapters.anomaly_prompt import ADVERBS
from looktwice_adapters.dialogue import Dialogue, Turn, picture_prefix
from looktwice_adapters.train.tokenizer import phrase_token_ids

IGNORED = -100


class PictureSlots(Protocol):
    """A picture's places in a sequence: how many stand before the phrase, how many behind it."""

    @property
    def before(self) -> int:
        """Embeddings before the phrase: the image tokens with their newlines."""

    @property
    def behind(self) -> int:
        """Embeddings behind the phrase: the suspicious tokens with their newlines."""


@dataclass(frozen=True)
class Sequence:
    """One dialogue for the language model: T token ids, labels (IGNORED where not supervised)."""

    ids: list[int]
    labels: list[int]
    pictures: tuple[PictureSlots, ...]  # whose embeddings fill the slots, in order


class SequenceWriter:
    """Writes dialogues as sequences of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the ids that every sequence needs."""
        self.tokenizer = tokenizer
        self.phrases = dict(zip(ADVERBS, phrase_token_ids(tokenizer), strict=True))
        self.image = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it count."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(self, turn: Turn, slots: Ordered[PictureSlots]) -> list[int]:
        """A user's message with its pictures, up to where the assistant begins to speak."""
        ids = self.encode("<|im_start|>user\n")
        texts = [picture_prefix(facts, "") for facts in turn.pictures]
        if not texts:
            ids += self.encode(turn.question)
        for index, (facts, picture) in enumerate(zip(turn.pictures, slots, strict=True)):
            ids += [self.image] * picture.before + self.phrases[facts.adverb]
            ids += [self.image] * picture.behind
            last = index == len(texts) - 1
            ids += self.encode(texts[index] + (turn.question if last else ""))
        return ids + self.encode("<|im_end|>\n<|im_start|>assistant\n")

    def write(self, dialogue: Dialogue, slots: Ordered[PictureSlots]) -> Sequence:
        """The whole dialogue; replies and the tokens that end them are supervised."""
        ids: list[int] = []
        labels: list[int] = []
        if dialogue.system:
            ids += self.encode(f"<|im_start|>system\n{dialogue.system}<|im_end|>\n")
        used = 0
        for turn in dialogue.turns:
            labels += [IGNORED] * (len(ids) - len(labels))
            ids += self.question(turn, slots[used : used + len(turn.pictures)])
            used += len(turn.pictures)
            labels += [IGNORED] * (len(ids) - len(labels))
            reply = [*self.encode(turn.reply), self.end]
            ids += reply
            labels += reply
            ids += self.encode("\n")
        labels += [IGNORED] * (len(ids) - len(labels))
        return Sequence(ids, labels, tuple(slots))


def padded(rows: Ordered[list[int]], filler: int) -> Tensor:
    """Lists of ids -> (B, T), filled on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
