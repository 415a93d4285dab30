"""Any vision model behind the OpenAI API as a judge: does it see a defect, and how sure is it?"""

import math
from collections.abc import Sequence
from typing import Any

import openai

from looktwice_adapters.answers import said_yes
from looktwice_adapters.datasets import Sample
from looktwice_adapters.detector import Judgement
from looktwice_adapters.evaluate.baselines import BaselineError
from looktwice_adapters.evaluate.chat import AUTHORS_QUESTION, Chat, ReplyError, one_line

TOP = 20  # most that the API gives


class VisionModelJudge:
    """Asks yes or no; scores by the share of "yes" in the first word's probability.

    Without log-probabilities the score is 1 for yes and 0 for no. References are not sent: MMAD
    found that they make such models worse.
    """

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: `URL` or `URL#MODEL`; without a model the server's first.

        Raises:
            BaselineError: the server cannot be reached, or names no model.
        """
        try:
            self.chat = Chat.at(address)
        except openai.APIError as error:
            raise BaselineError(one_line(error)) from error
        except ReplyError as error:
            raise BaselineError(str(error)) from error
        self.name = f"{self.chat.model} answers"
        self.options: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP}

    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Nothing to prepare."""

    def judge(self, sample: Sample) -> Judgement:
        """Its yes or no as a verdict, undecided where it says neither."""
        try:
            choice = self.chat.complete(AUTHORS_QUESTION, [sample], **self.options)
        except openai.BadRequestError:
            if not self.options:
                raise
            self.options = {}  # some servers refuse to give log-probabilities
            return self.judge(sample)
        yes = said_yes(choice.message.content or "")
        share = _share_of_yes(choice)
        if share is None:
            share = 0.5 if yes is None else float(yes)
        if yes is None:
            return Judgement(share, "undecided")
        return Judgement(share, "anomalous" if yes else "normal")

    def close(self) -> None:
        """Close the connection."""
        self.chat.client.close()


def _share_of_yes(choice: openai.types.chat.chat_completion.Choice) -> float | None:
    """P(yes) / (P(yes) + P(no)) of the first token; None where the server gives none."""
    if choice.logprobs is None or not choice.logprobs.content:
        return None
    mass = {True: 0.0, False: 0.0}
    for token in choice.logprobs.content[0].top_logprobs:
        word = token.token.strip().lower()
        if word in ("yes", "no"):
            mass[word == "yes"] += math.exp(token.logprob)
    total = mass[True] + mass[False]
    return mass[True] / total if total else None
