"""The small checkpoint: tower, assistant and expert -> models/nano, ready to be served."""

from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.train.assistant import Assistant
from looktwice_adapters.train.hub_format import nano_config, write_checkpoint
from looktwice_adapters.train.tokenizer import kept_tokenizer

SELECTOR = "llm_q_former."


def trained_model(tower: Path, assistant: Path) -> LlavaOnevisionForConditionalGeneration:
    """The LLaVA-OneVision part from the folders that the two trainings filled."""
    model = LlavaOnevisionForConditionalGeneration(
        nano_config(kept_tokenizer(assistant / "tokenizer"))
    )
    model.model.vision_tower.load_state_dict(load_file(tower / "tower.safetensors"))
    Assistant(model).load_state_dict(load_file(assistant / "assistant.safetensors"))
    return model.eval()


def write_expert(expert: Path, assistant: Path, out: Path) -> None:
    """Copy the expert, its selector of the LLM's tokens replaced by the assistant's."""
    trained = load_file(assistant / "assistant.safetensors")
    selector = {name: value for name, value in trained.items() if name.startswith(SELECTOR)}
    weights = load_file(expert)
    if {n: v.shape for n, v in weights.items() if n.startswith(SELECTOR)} != {
        n: v.shape for n, v in selector.items()
    }:
        raise click.ClickException(f"{expert} has no {SELECTOR}* of the assistant's sizes")
    save_file(weights | selector, out / "expert.safetensors")
    (out / "expert.safetensors").chmod(0o644)
    if expert.with_suffix(".json") != out / "expert.json":
        (out / "expert.json").write_text(expert.with_suffix(".json").read_text())


@click.command("nano")
@click.option("--tower", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--assistant", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--expert", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("models/nano"))
def nano(tower: Path, assistant: Path, expert: Path, out: Path) -> None:
    """Put the trained parts together as a checkpoint that every LLaVA-OneVision server loads.

    --tower and --assistant are the folders that their trainings filled; --expert is the
    expert.safetensors that its training left beside an expert.json.
    """
    with torch.no_grad():
        model = trained_model(tower, assistant)
        out.mkdir(parents=True, exist_ok=True)
        write_expert(expert, assistant, out)
        tokenizer = kept_tokenizer(assistant / "tokenizer")
        write_checkpoint(model, tokenizer, out, out / "expert.safetensors")
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    click.echo(f"{out}: {size:.1f} MiB")
