"""The small checkpoint: tower, assistant and expert -> models/nano, ready to be served."""

import json
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.checkpoint import check_state
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.train.hub_format import (
    nano_config,
    read_checkpoint,
    write_checkpoint,
    write_json,
)
from looktwice_adapters.train.nano_assistant import SELECTOR, NanoAssistant
from looktwice_adapters.train.tokenizer import kept_tokenizer


def trained_model(
    tower: Path | None, assistant: Path, out: Path
) -> LlavaOnevisionForConditionalGeneration:
    """The LLaVA-OneVision part from what the two trainings wrote; without `tower` with `out`'s."""
    if tower is None:
        looking = read_checkpoint(out)[0].model.vision_tower.state_dict()
    else:
        looking = load_file(tower / "tower.safetensors")
    tokenizer = kept_tokenizer(assistant / "tokenizer")
    model = LlavaOnevisionForConditionalGeneration(nano_config(tokenizer))
    model.model.vision_tower.load_state_dict(looking)
    NanoAssistant(model).load_state_dict(load_file(assistant / "assistant.safetensors"))
    return model.eval()


def write_expert(expert: Path, assistant: Path, out: Path) -> None:
    """Copy the expert and its section; the selector of the LLM's tokens is the assistant's."""
    trained = load_file(assistant / "assistant.safetensors")
    selector = {name: value for name, value in trained.items() if name.startswith(SELECTOR)}
    section = json.loads(expert.with_suffix(".json").read_text())
    section["llm_hidden_size"] = selector[f"{SELECTOR}key_proj.weight"].shape[1]
    found = load_file(expert)
    if expert.parent == out and all(
        name in found and found[name].equal(value) for name, value in selector.items()
    ):
        return  # it is in its place already
    weights = found | selector
    check_state(weights, ExpertConfig.from_dict(section))
    save_file(weights, out / "expert.safetensors")
    (out / "expert.safetensors").chmod(0o644)
    write_json(out / "expert.json", section)


@click.command("nano")
@click.option(
    "--tower",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train tower` filled.  [default: keep the tower of OUT]",
)
@click.option(
    "--assistant",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder that `looktwice train nano-assistant` filled.",
)
@click.option(
    "--expert",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="expert.safetensors that `looktwice train expert` left beside an expert.json.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models/nano"),
    show_default=True,
    help="Folder for the checkpoint; `looktwice serve` takes it.",
)
def nano(tower: Path | None, assistant: Path, expert: Path, out: Path) -> None:
    """Put the trained parts together as a checkpoint that every LLaVA-OneVision server loads."""
    with torch.no_grad():
        if tower is None and not (out / "config.json").exists():
            raise click.UsageError(f"{out} holds no checkpoint whose tower to keep: --tower FOLDER")
        model = trained_model(tower, assistant, out)
        out.mkdir(parents=True, exist_ok=True)
        write_expert(expert, assistant, out)
        tokenizer = kept_tokenizer(assistant / "tokenizer")
        write_checkpoint(model, tokenizer, out, out / "expert.safetensors")
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    click.echo(f"{out}: {size:.1f} MiB")
