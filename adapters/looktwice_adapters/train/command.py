"""`looktwice train`: a group whose commands are imported when they are called."""

from importlib import import_module

import click

# Name -> module and attribute. A command is added by one line.
COMMANDS = {
    "pictures": "looktwice_adapters.train.pictures:pictures",
    "synthesis": "looktwice_adapters.train.contact_sheet:synthesis",
    "expert": "looktwice_adapters.train.expert:expert",
    "calibrate": "looktwice_adapters.train.calibrating:calibration",
    "tower": "looktwice_adapters.train.tower:tower",
    "nano-assistant": "looktwice_adapters.train.nano_assistant:nano_assistant",
    "nano": "looktwice_adapters.train.nano:nano",
    "decoder": "looktwice_adapters.train.decoder:decoder",
    "dialogue": "looktwice_adapters.train.labelled_dialogue:dialogue",
    "assistant": "looktwice_adapters.train.assistant:assistant",
    "estimate": "looktwice_adapters.train.estimate:estimate",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which the stages are run."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=LazyGroup)
def train() -> None:
    """Train the papers' stages, from free pictures to a checkpoint.

    \b
    The expert (stage 1):       pictures, synthesis, expert, calibrate
    nano, from nothing:         tower, nano-assistant, nano
    AnomalyGPT's parts:         pictures, decoder
    Any checkpoint (stage 2):   dialogue, estimate, assistant

    Recipes for nano, 0.5B and 7B: docs/training.md. Every run logs to TensorBoard
    (tensorboard --logdir OUT) and goes on after an interruption with --resume.
    """
