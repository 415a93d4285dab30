"""Every `looktwice` command line in a page names a command and options that exist."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from looktwice_clients.cli import CommandEntry, looktwice

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "models/nano/README.md", *sorted(ROOT.glob("docs/*.md"))]
LINE = re.compile(
    r"^(?:\$ |`| +)?(?:\.venv/bin/|accelerate launch [^\n]*-m )?looktwice(?:_clients)? "
    r"([a-z](?:[^`\n\\]|\\\n)+)",
    re.MULTILINE,
)
WORD = re.compile(r"[a-z][a-z-]+")


def commands(text: str) -> list[list[str]]:
    """The command lines in code, split as a shell does, without what follows a comment or pipe."""
    blocks = re.findall(r"^(?:```\w*\n.*?^```| {4}.+)$|`looktwice [^`]+`", text, re.M | re.S)
    found = []
    for line in LINE.findall("\n".join(blocks)):
        cut = re.split(r"\s(?:#|\||&|;|\(log:)|\s{2,}#", line.replace("\\\n", " "))[0]
        found.append(shlex.split(cut.replace("'", "")))
    return found


@cache
def vllm_flags() -> set[str]:
    """What `vllm serve` takes, which `looktwice serve` hands on."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)


def unknown(words: list[str]) -> set[str]:
    """What of a command line does not exist: a command, or options of the one that is called."""
    command: click.Command = looktwice
    while isinstance(command, click.Group) and words and WORD.fullmatch(words[0]):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        if found is None:
            return {name}
        command = found.entry.load() if isinstance(found, CommandEntry) else found
    known = {name for option in command.params for name in option.opts} | {"--help"}
    if command.name == "serve":
        known |= vllm_flags()
    return {word.partition("=")[0] for word in words if word.startswith("-")} - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path):
    wrong = {" ".join(words): unknown(words) for words in commands(page.read_text())}
    assert {line: names for line, names in wrong.items() if names} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_exist(page: Path):
    text = page.read_text()
    assert all(find_spec(module) for module in re.findall(r"\bpython -m ([\w.]+)", text))
    assert all((ROOT / file).is_file() for file in re.findall(r"\bpython ([\w/]+\.py)", text))


BARE = re.compile(r"`(--[a-z][a-z-]+)[^`]*`")
"""An option that is named in the text, without its command."""


@cache
def every_option() -> set[str]:
    """Of each command, of `vllm serve`, and of the programs in benchmarks/."""
    of_commands = {
        name
        for _, command in every_command(looktwice)
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    programs = "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    return of_commands | vllm_flags() | set(re.findall(r'"(--[a-z][a-z-]+)"', programs))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_named_alone_exist(page: Path):
    assert set(BARE.findall(page.read_text())) - every_option() == set()


def test_the_lines_are_found():
    assert len({option for page in PAGES for option in BARE.findall(page.read_text())}) > 40
    found = [words for page in PAGES for words in commands(page.read_text())]
    assert len(found) > 60
    assert {"serve", "inspect", "reference", "evaluate", "train", "mcp"} <= {w[0] for w in found}


def every_command(
    group: click.Group, name: str = "looktwice"
) -> Iterator[tuple[str, click.Command]]:
    """Name of a group's commands and of its groups'."""
    context = click.Context(group)
    for word in group.list_commands(context):
        found = group.get_command(context, word)
        assert found is not None
        command = found.entry.load() if isinstance(found, CommandEntry) else found
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {word}")


def test_every_option_is_explained():
    silent = {
        f"{name} {option.opts[0]}"
        for name, command in every_command(looktwice)
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    }
    assert silent == set()


def test_no_help_shows_the_mark_that_keeps_its_lines():
    helps = {
        name: command.get_help(click.Context(command, info_name=name.split()[-1]))
        for name, command in every_command(looktwice)
    }
    assert {"looktwice serve", "looktwice train estimate", "looktwice reference add"} <= set(helps)
    assert [name for name, text in helps.items() if "\\b" in text or "\b" in text] == []


@pytest.mark.parametrize(
    "line", ["inspect --no-such", "serve nano --no-such", "train experts", "references list"]
)
def test_what_does_not_exist_is_noticed(line: str):
    assert unknown(line.split())
