"""The structured report: a picture -> fields for a manufacturing system, not prose.

The language model is given a JSON schema that holds words alone, each of bounded length, and
vLLM's structured output keeps it to them. Score, verdict, regions and all other facts are merged in
here, from the inspection: no field of a report that decides anything was written by a model.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from looktwice_clients.conversation import Answer
from looktwice_clients.errors import ReplyError, printable
from looktwice_clients.schemas import Inspection

QUESTION = (
    "Report on this picture for the quality log: a summary, how the suspicious places look, and "
    "what to do next."
)


Words = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\"\\]*$")]
"""A text of one line, without what JSON would have to escape."""


class ReportWords(BaseModel):
    """What the language model writes."""

    # A small model may write white space without end where JSON allows it: vLLM's guidance backend,
    # which a text with pattern and length calls for, allows it none.
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}}
    )

    summary: Words
    appearance: Words
    """How the suspicious places look."""
    advice: Words
    """What to do next."""


class InspectionReport(Inspection):
    """An inspection with a language model's words beside its facts."""

    summary: str
    appearance: str
    advice: str


RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "report_words",
        "strict": True,
        "schema": ReportWords.model_json_schema(),
    },
}
"""The argument `response_format` of the OpenAI SDK."""

MAX_TOKENS = 700
"""Of a report: three texts of 200 characters, each at worst a token of its own, and their names."""


def report_from(answer: Answer) -> InspectionReport:
    """The facts of the answer's last picture, and its words.

    Raises:
        ReplyError: there is no picture, or the words are not those that were asked for.
    """
    if not answer.inspections:
        raise ReplyError("there is no picture to report on")
    try:
        words = ReportWords.model_validate_json(answer.text)
    except ValidationError:
        cut = "; raise max_tokens" if answer.finish_reason == "length" else ""
        raise ReplyError(f"the model's words are not the report that was asked for{cut}") from None
    said = {name: printable(text) for name, text in words.model_dump().items()}
    return InspectionReport.model_validate(answer.inspections[-1].model_dump() | said)
