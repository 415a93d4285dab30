"""The command `looktwice`: a group whose commands are entry points, imported when they are called.

Every package adds its commands to the entry-point group `looktwice.commands`. All are listed with
their help, which stands here, so that `looktwice --help` imports none of them; one that lacks a
package says which extra brings it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, TypeVar

import click

from looktwice_clients.address import DEFAULT_URL, TIMEOUT
from looktwice_clients.errors import one_line

Command = TypeVar("Command", bound=Callable[..., Any])

COMMANDS = {
    "serve": "Run the OpenAI-compatible inspection server.",
    "inspect": "Score, verdict and regions of pictures.",
    "reference": "The normal pictures of a product.",
    "chat": "Talk about pictures in the terminal.",
    "evaluate": "Measure detection, localization and answers on data sets.",
    "mcp": "Serve the inspection to assistants over MCP.",
    "chatbot": "Serve the inspection page for the plant.",
    "train": "Train the papers' stages.",
    "convert-expert": "Convert the authors' released expert weights.",
    "doctor": "Say what is wrong with this machine's set-up, and what to do.",
}
"""Help of the project's own commands, in the order in which they are listed."""

EXTRAS = {
    "chatbot": "'looktwice[chatbot]'",
    "serve": "'looktwice[cpu]' (or 'looktwice[gpu]')",
    "evaluate": "'looktwice[evaluate]'",
    "mcp": "'looktwice[mcp]'",
    "train": "'looktwice[train]'",
    "convert-expert": "'looktwice[adapters]'",
}
"""What to install for a command that the base install cannot run."""

OWN_PACKAGES = {"looktwice_clients", "looktwice_adapters", "looktwice_server"}

url_option = click.option(
    "--url", metavar="URL", help=f"The server's address; else $LOOKTWICE_URL, else {DEFAULT_URL}."
)


def timeout_option(seconds: float = TIMEOUT) -> Callable[[Command], Command]:
    """`--timeout`, with `seconds` as its default."""
    return click.option(
        "--timeout",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        default=seconds,
        show_default=True,
        help="How long each try of a request may take.",
    )


class MissingExtra(click.ClickException):
    """A command needs a package that is not installed; exit code 2."""

    exit_code = 2

    def __init__(self, command: str, package: str) -> None:
        """Name the command, the missing package and, where known, the extra that brings it."""
        install = EXTRAS.get(command, package)
        super().__init__(f"`looktwice {command}` needs {package}: pip install {install}")


class CommandEntry(click.Command):
    """A command that is listed from its entry point and imported when it is called."""

    def __init__(self, entry: EntryPoint) -> None:
        """Import nothing."""
        help_line = COMMANDS.get(entry.name, f"From {entry.value.partition('.')[0]}.")
        super().__init__(entry.name, help=help_line, short_help=help_line, add_help_option=False)
        self.entry = entry

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The real command's context, so that the real command parses and runs from here on.

        Raises:
            MissingExtra: its module imports a package that is not installed.
        """
        try:
            command: click.Command = self.entry.load()
        except ModuleNotFoundError as error:
            raise missing_extra(self.entry.name, error) from None
        return command.make_context(info_name, args, parent, **extra)


class CommandGroup(click.Group):
    """The group of all commands that the installed packages add."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, the project's own first, in `COMMANDS`' order."""
        names = {entry.name for entry in entry_points(group="looktwice.commands")}
        own = [name for name in COMMANDS if name in names]
        return own + sorted(names - set(own))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, not yet imported; None where there is none."""
        found = entry_points(group="looktwice.commands", name=cmd_name)
        return CommandEntry(next(iter(found))) if found else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was called; imports inside it may find an extra missing too."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise missing_extra(ctx.invoked_subcommand or "", error) from None


def missing_extra(command: str, error: ModuleNotFoundError) -> Exception:
    """`MissingExtra` for other people's packages; `error` itself for the project's own modules."""
    package = (error.name or "").partition(".")[0]
    return error if not package or package in OWN_PACKAGES else MissingExtra(command, package)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(version("looktwice"), prog_name="looktwice")
def looktwice() -> None:
    """Visual inspection behind the OpenAI API: score, map, regions and verdict from an anomaly
    expert, words from a language model.

    Exit codes: 0 done, 1 the thing asked for failed, 2 wrong usage.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run `looktwice` and exit: 0 done, 1 failed, 2 wrong usage; an error is one line."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run `looktwice` with `args` (the process's own by default) and return the exit code.

    $LOOKTWICE_DEBUG=1 shows the traceback of an error that is not the user's.
    """
    try:
        code = looktwice.main(args, prog_name="looktwice", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.UsageError as error:
        hint = f" Try `{error.ctx.command_path} --help`." if error.ctx else ""
        return _fail(" ".join(error.format_message().split()) + hint, error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 1)
    except Exception as error:
        if os.environ.get("LOOKTWICE_DEBUG"):
            raise
        return _fail(one_line(error), 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    click.echo(f"looktwice: {message}", err=True)
    return code
