"""Expert files: the authors' released .pth, or safetensors -> a checked state dict, an expert.

Names and shapes are strict: a missing, extra or misshapen tensor is an error that names it.
"""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from looktwice_adapters.expert import AnomalyExpert, ExpertConfig


class ExpertFileError(ValueError):
    """The file is not an anomaly expert, or not one of the asked sizes."""


def read_expert(path: str | Path) -> dict[str, Tensor]:
    """Parameter name -> tensor of an expert's file, whatever its format; nothing is executed.

    Raises:
        ExpertFileError: the file is missing, unreadable or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertFileError(f"no expert file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to execute the file
        raise ExpertFileError(
            f"cannot read {path}: it is broken, or holds something else than tensors, "
            "which is not loaded because it could execute code"
        ) from error
    except Exception as error:  # a broken file is reported by whatever the reader stumbles over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ExpertFileError(f"cannot read {path}: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ExpertFileError(f"{path} is not a dictionary of tensors")
    return state


def released_config(state: dict[str, Tensor]) -> ExpertConfig:
    """The sizes of an expert in the released format, read off its tensors.

    Raises:
        ExpertFileError: a tensor from which a size is read is missing.
    """
    try:
        levels = sum(name.startswith("siglip_adaptors.") for name in state) // 2
        base = ExpertConfig(
            level_sizes=tuple(state[f"siglip_adaptors.{i}.weight"].shape[1] for i in range(levels)),
            hidden_size=state["class_predictor.0.weight"].shape[1],
            embed_size=state["positive_embedding"].shape[1],
            key_size=state["q_former.key_proj.weight"].shape[0],
            head_size=state["final_predictor.0.weight"].shape[0],
        )
        grid = round(state["pooling_layer.0.weight"].shape[1] ** 0.5)
    except KeyError as error:
        raise ExpertFileError(f"not an anomaly expert: it has no tensor {error}") from error
    return replace(base, tower=replace(base.tower, grid=grid))


def section_beside(path: Path) -> dict[str, Any]:
    """What `looktwice train expert` wrote of an expert beside its file; released ones have nothing.

    Raises:
        ExpertFileError: it is no JSON object.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        section = json.loads(beside.read_bytes())
    except ValueError as error:
        raise ExpertFileError(f"{beside} is not JSON: {error}") from error
    if not isinstance(section, dict):
        raise ExpertFileError(f"{beside} is not a JSON object")
    return section


def check_state(state: dict[str, Tensor], config: ExpertConfig) -> None:
    """Compare names and shapes with an expert of the given sizes.

    Raises:
        ExpertFileError: naming the first differing tensor and the number of others.
    """
    with torch.device("meta"):
        expected = AnomalyExpert(config).state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ExpertFileError(f"not an expert of these sizes: {min(faults)}{more}")


def load_expert(path: str | Path, config: ExpertConfig | None = None) -> AnomalyExpert:
    """An expert with the file's weights in float32, ready to judge.

    Args:
        path: the authors' released file, or safetensors.
        config: its sizes; read off the file where it has the released format.

    Raises:
        ExpertFileError: the file cannot be read or does not fit the sizes.
    """
    state = read_expert(path)
    config = config or released_config(state)
    check_state(state, config)
    return AnomalyExpert(config).load(state)


def file_sha256(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal digits, as `sha256sum` prints it."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: str | Path) -> str:
    """The first 16 digits of the file's SHA-256: the name of these weights."""
    return file_sha256(path)[:16]


@click.command("convert-expert")
@click.argument("official", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def convert_expert(official: Path, out: Path) -> None:
    """Convert the authors' released expert OFFICIAL.pth to OUT.safetensors.

    Names, shapes and values stay as they are; the file is only read as tensors, never executed.
    """
    try:
        state = read_expert(official)
        config = released_config(state)
        check_state(state, config)
    except ExpertFileError as error:
        raise click.ClickException(str(error)) from error
    if out.suffix != ".safetensors":
        raise click.UsageError(f"OUT must end in .safetensors, got {out.name}")
    save_file({name: value.contiguous() for name, value in state.items()}, out)
    click.echo(
        f"{out}: {len(state)} tensors, {len(config.level_sizes)} levels of "
        f"{config.hidden_size} channels, {config.tower.grid}x{config.tower.grid} tokens a crop, "
        f"expert {file_hash(out)}"
    )
