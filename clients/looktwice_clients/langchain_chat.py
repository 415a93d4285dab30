"""A LookTwice server as a LangChain chat model: messages in, an answer with its inspections out."""

from typing import Any

from langchain_core.messages import BaseMessageChunk
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from openai import BaseModel
from pydantic import Field, SecretStr

from looktwice_clients.address import server_key, server_url


class ChatLookTwice(ChatOpenAI):
    """`ChatOpenAI` that keeps the facts: an answer's `response_metadata["inspections"]`.

    The list has one inspection (JSON, as on the wire) for each picture of the request; in a stream
    it comes with the last chunk that has content. What to inspect with goes into `extra_body`, such
    as `{"inspection": {"reference": "bottle", "map": True}}`.
    """

    model_name: str = Field(alias="model")
    """The model's name on the server, such as "looktwice-nano"."""
    openai_api_base: str | None = Field(default_factory=server_url, alias="base_url")
    """The server's address; else $LOOKTWICE_URL, else http://127.0.0.1:8000/v1."""
    openai_api_key: SecretStr = Field(
        default_factory=lambda: SecretStr(server_key()), alias="api_key"
    )
    """Else $LOOKTWICE_API_KEY, else $OPENAI_API_KEY, else none."""
    use_responses_api: bool | None = False
    """The server speaks chat completions."""
    stream_usage: bool | None = True
    """Whether a stream ends with its numbers of tokens."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """No: LangChain loads back only the classes on its own list."""
        return False

    def _create_chat_result(
        self, response: dict[str, Any] | BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        extra = response if isinstance(response, dict) else (response.model_extra or {})
        for generation in result.generations:
            _keep(extra, generation.message.response_metadata)
        return result

    def _convert_chunk_to_generation_chunk(
        self,
        chunk: dict[str, Any],
        default_chunk_class: type[BaseMessageChunk],
        base_generation_info: dict[str, Any] | None,
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(
            chunk, default_chunk_class, base_generation_info
        )
        if generation is not None:
            # With `response_format` the SDK's events come, which hold the chunk.
            _keep(chunk.get("chunk") or chunk, generation.message.response_metadata)
        return generation


def _keep(reply: dict[str, Any], metadata: dict[str, Any]) -> None:
    if "inspections" in reply:
        metadata["inspections"] = reply["inspections"]
