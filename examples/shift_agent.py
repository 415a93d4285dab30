"""A LangChain agent that looks through a shift's pictures and writes the shift note.

Usage: python examples/shift_agent.py FOLDER --model-url URL --model NAME [--reference PRODUCT]

The model is any that calls tools behind an OpenAI-compatible URL; its key is $AGENT_API_KEY.
The agent knows the pictures by number, never by file name. Its one tool tells it facts, and shows
a picture with its regions where the model asks for that.
The note's table is made by code, from the inspections themselves: whatever the model was talked
into, a defect that was found stands in it, and so does a picture that was left out.
"""

import argparse
import os
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from openai import OpenAIError

from looktwice_clients import Inspection
from looktwice_clients.cli_inspect import expand
from looktwice_clients.errors import one_line, printable
from looktwice_clients.langchain_tool import InspectionTool

INSTRUCTIONS = """You write the shift note of a production line.
Inspect every picture that you are given with inspect_image, by its id. Where a reference is named,
compare with it. Then answer with the remarks for the note: which pictures need a person's eye and
why, in at most six sentences. Report verdicts, scores and places as the tool gave them."""

MOST_REMARKS = 2000
"""Characters of the model's remarks that go into the note."""


def write_note(
    model: BaseChatModel,
    pictures: Sequence[Path],
    reference: str | None = None,
    url: str | None = None,
) -> str:
    """Let the agent inspect `pictures`; the shift note in Markdown.

    Args:
        model: any chat model that calls tools.
        pictures: files to look at.
        reference: name of the product's reference on the inspection server.
        url: the inspection server; else $LOOKTWICE_URL, else http://127.0.0.1:8000/v1.

    Raises:
        Exception: the model's own, where it failed before it inspected anything; later it becomes
            a remark.
    """
    media = {f"picture-{number}": path for number, path in enumerate(pictures, 1)}
    tool = InspectionTool(url=url, media=media)
    agent = create_agent(model, [tool], system_prompt=INSTRUCTIONS)
    task = f"Pictures: {', '.join(media)}. Reference: {reference or 'none'}."
    messages: list[AnyMessage] = []
    remarks = ""
    try:
        # A model that calls tools without end is stopped; the note has what was found by then.
        limit = {"recursion_limit": 4 * len(media) + 10}
        for state in agent.stream(
            {"messages": [{"role": "user", "content": task}]}, limit, stream_mode="values"
        ):
            messages = state["messages"]
        remarks = messages[-1].text
    except GraphRecursionError:
        remarks = "The model did not come to an end; it wrote no remarks."
    except Exception as error:  # models of every make raise all kinds; what was found is kept
        if not any(isinstance(message, ToolMessage) for message in messages):
            raise  # nothing was inspected: there is no note to write
        remarks = f"The model failed, these are not its words: {_reason(error)}"
    return note(media, messages, remarks, reference)


def note(
    media: dict[str, Path],
    messages: Sequence[AnyMessage],
    remarks: str,
    reference: str | None = None,
) -> str:
    """The note: a table from the tool's artifacts and errors, the model's remarks as a quotation.

    What was to be compared with a reference and was not, is said.
    """
    rows = []
    answered = list(_answered(messages))
    for name, path in media.items():
        of_this = [message for asked, message in answered if asked == name]
        results = [m.artifact for m in of_this if isinstance(m.artifact, Inspection)]
        failures = [m.text for m in of_this if m.status == "error"]
        facts = [result.facts() for result in results] + failures or ["NOT INSPECTED"]
        compared = {result.reference.name for result in results if result.reference}
        if reference and reference not in compared:
            facts.append(f"NOT COMPARED WITH {reference}")
        rows += [f"| {_cell(path.name)} | {_cell(line)} |" for line in dict.fromkeys(facts)]
    quoted = "\n".join(
        f"> {line}" for line in printable(remarks[:MOST_REMARKS], keep="\n").splitlines()
    )
    head = ["# Shift note", "", "| picture | inspection |", "|---|---|"]
    return "\n".join([*head, *rows, "", "Remarks of the language model:", "", quoted, ""])


def _answered(messages: Sequence[AnyMessage]) -> Iterator[tuple[str, ToolMessage]]:
    """Each of the tool's answers, with the picture that it was asked about.

    Some models number their calls anew in every turn, or give all one number: an answer belongs to
    the first call of the turn that has its number and no answer yet.
    """
    asked: defaultdict[str | None, deque[str]] = defaultdict(deque)
    for message in messages:
        if calls := getattr(message, "tool_calls", ()):
            asked.clear()
        for call in calls:
            asked[call["id"]].append(str(call["args"].get("image")))
        if isinstance(message, ToolMessage) and asked[message.tool_call_id]:
            yield asked[message.tool_call_id].popleft(), message


def _reason(error: Exception, url: str = "the model") -> str:
    """Why the agent's model failed, in one line; it is not `looktwice serve`."""
    return one_line(error, url).partition(": is `looktwice")[0]


def _cell(text: str) -> str:
    """`text` as one cell of a Markdown table, with nothing in it that Markdown would act on."""
    safe = printable(" ".join(text.split()))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|!#" else c for c in safe)


def main() -> int:
    """Read the arguments, print the note."""
    parser = argparse.ArgumentParser(description="Write a shift note about a folder of pictures.")
    parser.add_argument("folder", help="the shift's pictures")
    parser.add_argument("--model-url", required=True, help="the tool-calling model's API")
    parser.add_argument("--model", required=True, help="its name")
    parser.add_argument("--reference", help="the product's reference on the inspection server")
    parser.add_argument("--url", help="the inspection server; else $LOOKTWICE_URL")
    asked = parser.parse_args()
    folder = Path(asked.folder)
    found = expand((asked.folder,)) if folder.is_dir() else []
    pictures = [Path(target.path) for target in found if target.problem is None]
    if not pictures:
        parser.error(f"no pictures in {asked.folder}")
    model = ChatOpenAI(
        model=asked.model,
        base_url=asked.model_url,
        api_key=os.environ.get("AGENT_API_KEY", "none"),
        temperature=0,
    )
    try:
        print(write_note(model, pictures, asked.reference, asked.url))
    except OpenAIError as error:
        print(f"shift_agent: the model: {_reason(error, asked.model_url)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
