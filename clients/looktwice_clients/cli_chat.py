"""`looktwice chat`: a conversation about pictures in the terminal, or one read from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from looktwice_clients.cli import timeout_option, url_option
from looktwice_clients.errors import LookTwiceError, one_line, printable

if TYPE_CHECKING:
    from looktwice_clients.conversation import Conversation

HELP = """/image PATH   put a picture into your next question (a file or an http(s) address)
/drop         take the pictures of your next question out again
/help         this list
/quit         end the conversation"""


@click.command()
@click.argument("image", required=False, metavar="[IMAGE]")
@click.option("--reference", metavar="NAME", help="Compare with this product's normal images.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="An answer's."
)
@url_option
@timeout_option()
@click.pass_context
def chat(
    ctx: click.Context,
    image: str | None,
    reference: str | None,
    max_tokens: int,
    url: str | None,
    timeout: float,
) -> None:
    """Talk about IMAGE: every line is a question, the answer is printed as it is written.

    Each picture's facts are printed below the answer that first saw it. /image PATH adds a picture,
    /quit ends. Questions may come from a pipe; the exit code is 1 if one of them failed.
    """
    from looktwice_clients.inspector import Inspector

    with Inspector(url, timeout=timeout) as inspector:
        conversation = inspector.chat(reference=reference, max_tokens=max_tokens)
        dialogue = Dialogue(conversation, inspector.url)
        if image is not None:
            dialogue.attach(image, must=True)
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  line editing and history in input()
            click.echo(f"{inspector.url}. Ask a question; /help lists the commands.")
        failures = sum(not dialogue.take(line) for line in _lines())
    ctx.exit(1 if failures and not sys.stdin.isatty() else 0)


class Dialogue:
    """A conversation with the names of its pictures, printed as it goes."""

    def __init__(self, conversation: "Conversation", url: str | None = None) -> None:
        """Start with no pictures."""
        self.conversation = conversation
        self.url = url
        self.names: list[str] = []
        self.told = 0

    def attach(self, name: str, must: bool = False) -> bool:
        """Put a picture into the next question; whether it is one.

        Raises:
            ImageError: `must`, and it is none.
        """
        try:
            self.conversation.attach(name)
        except LookTwiceError as error:
            if must:
                raise
            return _complain(error, None)
        self.names.append(name)
        return True

    def take(self, line: str) -> bool:
        """Do what one line says: a command, a question, or nothing; whether that worked."""
        command, _, rest = line.partition(" ")
        if not line:
            return True
        if command == "/image" and rest:
            return self.attach(rest.strip().strip("'\""))
        if line == "/drop":
            return self.drop()
        if command == "/help":
            click.echo(HELP)
            return True
        if line.startswith("/"):
            click.echo(f"looktwice: no command {printable(line)}; /help lists them", err=True)
            return False
        return self.ask(line)

    def ask(self, question: str) -> bool:
        """Print the answer while it is written, then the new pictures' facts; whether it came."""
        import openai

        pieces = None
        try:
            # Bytes of a pipe that are no UTF-8 could not be sent.
            pieces = self.conversation.stream(printable(question, keep="\t"))
            for piece in pieces:
                click.echo(printable(piece, keep="\n\t"), nl=False)
        except KeyboardInterrupt:
            if pieces is not None:  # else nothing was answered yet
                pieces.close()
            click.echo(" [stopped; this turn is forgotten]")
            return False
        except (LookTwiceError, openai.OpenAIError) as error:
            _complain(error, self.url)
            if isinstance(error, openai.BadRequestError) and self.conversation.waiting:
                click.echo("looktwice: /drop takes the question's pictures out", err=True)
            return False
        click.echo()
        self._print_facts()
        return True

    def drop(self) -> bool:
        """Take the next question's pictures out; whether there were any."""
        kept = len(self.names) - self.conversation.detach()
        dropped, self.names = self.names[kept:], self.names[:kept]
        click.echo(f"taken out: {printable(', '.join(dropped)) or 'no picture waits'}")
        return bool(dropped)

    def _print_facts(self) -> None:
        inspections = self.conversation.inspections
        for inspection in inspections[self.told :]:
            at = inspection.image
            name = self.names[at] if at < len(self.names) else f"picture {at + 1}"
            click.echo(f"[{printable(name)}: {printable(inspection.facts())}]")
        self.told = len(inspections)


def _lines() -> Iterator[str]:
    """The lines that the user types or pipes in, until /quit or the end."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        yield line


def _complain(error: Exception, url: str | None) -> bool:
    click.echo(f"looktwice: {one_line(error, url)}", err=True)
    return False
