"""Served prompts: a conversation and what its pictures' inspections say -> token ids and labels.

The prompt is what the server builds: the checkpoint's own chat template, and behind each picture
its facts sentence. A picture is one <image> token here; its embeddings (image tokens and anomaly
prompt) take that token's place when they are known.
"""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from looktwice_adapters.train.conversations import Conversation, ConversationError
from looktwice_adapters.train.sequences import IGNORED


def template_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation in parts, as chat templates take it."""
    return [
        {
            "role": message.role,
            "content": [
                *({"type": "image"} for _ in message.pictures),
                {"type": "text", "text": message.text},
            ],
        }
        for message in conversation.messages
    ]


def served_prompt(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversation: Conversation,
    facts: Sequence[str],
) -> tuple[list[int], list[int]]:
    """Ids and labels (T,) of a conversation; answers and the tokens that end them are supervised.

    The last answer follows the generation prompt as it does when it is asked for; earlier ones
    stand as the template writes them into a history.

    Args:
        tokenizer: the checkpoint's.
        template: its chat template.
        conversation: what is said.
        facts: of each picture the facts sentence that stands behind it, "" for none.

    Raises:
        ConversationError: the template does not write messages one behind the other, as they are.
    """
    image = int(tokenizer.convert_tokens_to_ids("<image>"))
    behind = [tokenizer.encode(text, add_special_tokens=False) for text in facts]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for token in tokenizer.encode(text, add_special_tokens=False):
            ids += [token, *behind.pop(0)] if token == image else [token]
        return ids

    ids: list[int] = []
    labels: list[int] = []
    for before, answer, after in _pieces(tokenizer, template, conversation):
        plain, said, rest = encode(before), encode(answer), encode(after)
        ids += plain + said + rest
        labels += [IGNORED] * len(plain)
        labels += [*said, *rest[:1]] if answer else []
        labels += [IGNORED] * (len(ids) - len(labels))
    return ids, labels


def _pieces(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> list[tuple[str, str, str]]:
    """Of each message: the text before its answer, the answer ("" for the user's), the rest."""
    messages = template_messages(conversation)

    def written(count: int, generation: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        )

    pieces, done = [], ""
    for index, message in enumerate(conversation.messages):
        whole = written(index + 1)
        if not whole.startswith(done):
            raise ConversationError(f"the chat template rewrites {conversation.name}'s history")
        part = whole[len(done) :]
        if message.role != "assistant":
            pieces.append((part, "", ""))
        else:
            asked = written(index, generation=True)[len(done) :]
            # Behind what stands before every answer; its own text may be in the marks, too ("n").
            start = part.find(message.text, len(commonprefix((part, asked))))  # noqa: RUF071  of characters
            if start < 0:
                raise ConversationError(f"the chat template rewrites {conversation.name}'s answers")
            before = asked if index == len(conversation.messages) - 1 else part[:start]
            pieces.append((before, message.text, part[start + len(message.text) :]))
        done = whole
    return pieces
