"""An OpenAI-compatible server on the wire: pictures and questions -> answers.

For yes/no answers, multiple-choice questions, reasoning, and the language model that judges it.
"""

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletionMessageParam
from PIL import Image

from looktwice_adapters.datasets import Sample, read_sample

# What Anomaly-OV's authors ask in their own test of detection.
AUTHORS_QUESTION = (
    "Are there any defects for the object in the image? Please reply with 'Yes' or 'No'."
)
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MAX_TOKENS = 512

Turns = Sequence[tuple[str, str]]  # earlier questions with their answers


def connect(url: str) -> openai.OpenAI:
    """A client of the server at `url`, with the key of $LOOKTWICE_API_KEY or $OPENAI_API_KEY."""
    key = os.environ.get("LOOKTWICE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    return openai.OpenAI(base_url=url.rstrip("/"), api_key=key)


class ReplyError(ValueError):
    """What answers at an address speaks no OpenAI API, or serves no model."""


def first_model(client: openai.OpenAI) -> str:
    """The name of the server's first model.

    Raises:
        openai.APIError: the server cannot be reached.
        ReplyError: its reply is no list of models, or an empty one.
    """
    reply: Any = client.get("/models", cast_to=object)
    try:
        return str(reply["data"][0]["id"])
    except IndexError:
        raise ReplyError(f"{client.base_url} lists no model") from None
    except (KeyError, TypeError):
        raise ReplyError(f"{client.base_url} is no OpenAI API, whose address ends in /v1") from None


def one_line(error: openai.APIError) -> str:
    """What went wrong with a request, and where, for a person."""
    address = error.request.url
    if isinstance(error, openai.APIConnectionError):
        return f"no answer from {address}: {error.__cause__ or error}"
    body = error.body if isinstance(error.body, dict) else {}
    status = getattr(error, "status_code", "an error")
    return f"{address} answered {status}: {' '.join(str(body.get('message') or error).split())}"


def data_uri(sample: Sample) -> str:
    """A sample's picture for the wire: its file where every server reads such, else a PNG."""
    mime = MIME.get(sample.path.suffix.lower())
    if mime and sample.box is None:
        content = sample.path.read_bytes()
    else:
        buffer = io.BytesIO()
        Image.fromarray(read_sample(sample)).save(buffer, "PNG")
        content, mime = buffer.getvalue(), "image/png"
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def picture(path: Path) -> Sample:
    """A picture file that belongs to no data set."""
    return Sample(path, "", "test", "")


class Chat:
    """Asks one model of a server, always with temperature 0."""

    def __init__(self, url: str, model: str | None = None) -> None:
        """Connect; without `model` the server's first is asked.

        Raises:
            openai.APIError: the server cannot be reached.
            ReplyError: it names no model.
        """
        self.client = connect(url)
        self.model = model or first_model(self.client)

    @classmethod
    def at(cls, address: str) -> "Chat":
        """Connect to `URL` or `URL#MODEL`; raises as above."""
        url, _, model = address.partition("#")
        return cls(url, model or None)

    def complete(
        self, question: str, pictures: Sequence[Sample] = (), earlier: Turns = (), **options: Any
    ) -> openai.types.chat.chat_completion.Choice:
        """The model's answer to a question about pictures, which stand in the first turn.

        Raises:
            openai.APIError: there is none.
            ReplyError: a web page came instead.
        """
        asked = [*earlier, (question, None)]
        messages: list[ChatCompletionMessageParam] = []
        for index, (text, answer) in enumerate(asked):
            parts: list[Any] = [{"type": "text", "text": text}]
            if index == 0:
                urls = [data_uri(sample) for sample in pictures]
                parts[:0] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            messages.append({"role": "user", "content": parts if len(parts) > 1 else text})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        options = {"temperature": 0, "max_completion_tokens": MAX_TOKENS} | options
        answered = self.client.chat.completions.create(
            model=self.model, messages=messages, **options
        )
        # The client checks no reply: a web page comes as its text.
        if not getattr(answered, "choices", None):
            raise ReplyError(f"{self.client.base_url} answered with no chat completion")
        return answered.choices[0]

    def ask(
        self, question: str, pictures: Sequence[Sample] = (), earlier: Turns = (), **options: Any
    ) -> str:
        """The words of `complete`'s answer."""
        return self.complete(question, pictures, earlier, **options).message.content or ""
