"""Few-shot figures: data sets in MVTec AD's layout -> AUROC by shots, promises kept, coreset.

    python benchmarks/few_shot.py DATASET_DIR... --cache DIR [--augment] [--promises]

looks at every picture once (kept in the cache, as each result is: a run that was stopped goes on
where it ended) and prints Markdown: a row a product and number of shots, and their means.
"""

import json
import os
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import timm
import torch
from PIL import Image
from scipy.stats import t
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate
from tqdm import tqdm

from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.datasets import Sample, products, read_image, read_mask, read_product
from looktwice_adapters.detector import Detector
from looktwice_adapters.few_shot import (
    EXPERT_WEIGHT,
    Looked,
    build,
    common_grid,
    evidence,
    image_evidence,
    look,
    turns,
)
from looktwice_adapters.memory_bank import MemoryBank
from looktwice_adapters.recut import Cut, Grid
from looktwice_adapters.threshold import NormalScores
from looktwice_adapters.towers import lite0_weights, load_lite0

SIDE = 128  # pixels of the longer side at which maps and masks are compared
VERDICTS = ("anomalous", "undecided")
SPARE = 60  # normal pictures that a test of the promise needs beside the references
COLUMNS = (
    "plain memory", "expert", "bank", "fused", "bank of 10 %", "pixels", "good called anomalous",
    "good undecided", "defects called anomalous", "defects undecided",
)  # fmt: skip


class PlainMemory:
    """What references are worth without LookTwice: nearest patches of an ImageNet network.

    The whole picture at 256 px, three stages of EfficientNet-lite0 on 16x16 places, one minus the
    best cosine similarity a stage, their mean; of a picture the mean of the highest 2 %.
    """

    def __init__(self) -> None:
        self.network = timm.create_model(
            "tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4)
        ).eval()
        load_lite0(self.network, lite0_weights())

    def tokens(self, picture: np.ndarray) -> list[torch.Tensor]:
        small = Image.fromarray(picture).resize((256, 256), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 127.5 - 1
        return [
            interpolate(stage, (16, 16), mode="bilinear", antialias=True).flatten(2).mT
            for stage in self.network(pixels)
        ]

    def scores(self, references: list[list], pictures: list[list]) -> list[float]:
        bank = MemoryBank.of(references)
        maps = [bank.distances(tokens).flatten() for tokens in pictures]
        return [float(one.topk(round(0.02 * len(one))).values.mean()) for one in maps]


class Picture:
    """One picture as the expert saw it."""

    size: tuple[int, int] | None = None  # (width, height) that it is resized to

    def __init__(
        self, detector: Detector, sample: Sample, mixed: np.random.Generator | None = None
    ) -> None:
        self.path, self.anomalous = sample.path, sample.anomalous
        self.train = sample.split == "train"
        if mixed:
            self.size = another_size(read_image(self.path).shape[1::-1], mixed)
        picture = self.read()
        self.shape = picture.shape[:2]
        factor = SIDE / max(self.shape)
        self.mask = read_mask(sample, tuple(max(1, round(s * factor)) for s in self.shape))
        self.views: dict[Grid, tuple[list[torch.Tensor], torch.Tensor]] = {}
        expert = detector.expert
        levels, final = detector.tokens(picture)
        output, calibration = expert(levels, final, [len(final)]), expert.config.calibration
        self.zero_shot = float(calibration.score(output.score[0].double(), output.significance))
        seen = look(expert, levels, output.significance, calibration)
        self.keep(detector.grid(self.shape), seen)

    def read(self) -> np.ndarray:
        picture = read_image(self.path)
        if self.size is None:
            return picture
        return np.array(Image.fromarray(picture).resize(self.size, Image.Resampling.LANCZOS))

    def keep(self, grid: Grid, seen: Looked) -> None:
        self.views[grid] = [level.half() for level in seen.tokens], seen.suspicion

    def looked(self, detector: Detector, grid: Grid) -> Looked:
        """By its crops on a grid; kept in half precision."""
        if grid not in self.views:
            self.keep(grid, detector.look(self.read(), grid))
        tokens, suspicion = self.views[grid]
        return Looked([level.float() for level in tokens], suspicion)


def another_size(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """As if each picture came from another camera: 130 to 512 pixels, by 0.8 to 1.25 as wide."""
    side, stretch = np.exp(rng.uniform(np.log((130, 0.8)), np.log((512, 1.25))))
    width, height = size[0] * stretch, size[1]
    scale = side / max(width, height)
    return max(28, round(width * scale)), max(28, round(height * scale))


class Product:
    """A product's pictures, at most `limit` of each class and split."""

    def __init__(
        self,
        detector: Detector,
        folder: Path,
        name: str,
        limit: int,
        cache: Path,
        mixed: int | None,
    ) -> None:
        self.detector, self.name = detector, name
        self.file = cache / f"{name.replace('/', '_')}_{limit}.pt"
        sizes = None if mixed is None else np.random.default_rng(mixed)
        if self.file.exists():
            self.pictures: list[Picture] = torch.load(self.file, weights_only=False)
        else:
            groups: dict[tuple[str, bool], list[Sample]] = {}
            for sample in read_product(folder, name):
                groups.setdefault((sample.split, sample.anomalous), []).append(sample)
            rng = np.random.default_rng(0)
            chosen = [sample for group in groups.values() for sample in drawn(group, limit, rng)]
            self.pictures = [
                Picture(detector, sample, sizes) for sample in tqdm(chosen, desc=name, leave=False)
            ]
        for picture in tqdm(self.pictures, desc=name, leave=False):
            picture.looked(detector, self.grid)
        self.save()

    def save(self) -> None:
        torch.save(self.pictures, self.file)

    @cached_property
    def plain(self) -> tuple[PlainMemory, dict[Path, list[torch.Tensor]]]:
        memory = PlainMemory()
        pictures = tqdm(self.pictures, desc=f"{self.name}, plain", leave=False)
        return memory, {one.path: memory.tokens(one.read()) for one in pictures}

    @cached_property
    def grid(self) -> Grid:
        return self.grid_of([one for one in self.pictures if not one.anomalous])

    def grid_of(self, references: list[Picture]) -> Grid:
        return common_grid([self.detector.grid(one.shape) for one in references])

    @property
    def prior(self) -> NormalScores:
        return self.detector.expert.config.calibration.normal_scores

    def looked(self, pictures: list[Picture], grid: Grid) -> list[Looked]:
        return [picture.looked(self.detector, grid) for picture in pictures]

    def split(self, shots: int, seed: int) -> tuple[list[Picture], list[Picture]]:
        """References by seed, of train or else of test, and the test pictures."""
        pool = [p for p in self.pictures if p.train]
        pool = pool or [p for p in self.pictures if not p.anomalous]
        references = drawn(pool, shots, np.random.default_rng(seed))
        return references, [p for p in self.pictures if not p.train and p not in references]

    def copies(self, references: list[Picture], grid: Grid) -> list[list[torch.Tensor]]:
        """Of each picture the tokens of its turned and mirrored crops."""
        expert, found = self.detector.expert, []
        for picture in references:
            turned = turns(self.detector.cut(picture.read()).on(grid))
            levels = [expert.patch_tokens(expert.tower(crops)[0]) for crops in turned]
            found.append([torch.cat(level) for level in zip(*levels, strict=True)])
        return found

    def figures(self, shots: int, seed: int, augment: bool) -> list[float]:
        """What COLUMNS says, in %."""
        references, test = self.split(shots, seed)
        grid = self.grid_of(references)
        seen, pictures = self.looked(references, grid), self.looked(test, grid)
        copies = self.copies(references, grid) if augment else ()
        reference = build(seen, copies=copies, grid=grid, prior=self.prior).reference
        size = len(reference.bank) // 10
        thin = build(seen, copies=copies, grid=grid, patches=size).reference
        found = [evidence(reference.bank, one) for one in pictures]
        plain = [
            one - EXPERT_WEIGHT * picture.suspicion
            for one, picture in zip(found, pictures, strict=True)
        ]
        fused = [image_evidence(one) for one in found]
        verdicts = np.array([reference.threshold.verdict(value) for value in fused])
        anomalous = np.array([picture.anomalous for picture in test])
        memory, tokens = self.plain
        groups = ([tokens[picture.path] for picture in group] for group in (references, test))
        return [
            auroc(anomalous, memory.scores(*groups)),
            auroc(anomalous, [p.zero_shot for p in test]),
            auroc(anomalous, [image_evidence(one) for one in plain]),
            auroc(anomalous, fused),
            auroc(anomalous, [image_evidence(evidence(thin.bank, one)) for one in pictures]),
            self.pixel_auroc(test, found, grid),
            *(
                100 * np.mean(verdicts[anomalous == group] == kind)
                for group in (False, True)
                for kind in VERDICTS
            ),
        ]

    def pixel_auroc(self, test: list[Picture], maps: list[torch.Tensor], grid: Grid) -> float:
        truth, values = [], []
        for picture, found in zip(test, maps, strict=True):
            if picture.mask is not None:
                height, width = picture.shape
                cut = Cut(torch.empty(0), (width, height), self.detector.grid(picture.shape))
                empty = np.empty((height, width, 3), np.uint8)
                whole = self.detector.stitched(cut.back(found, grid), empty)
                size = picture.mask.shape
                small = interpolate(whole[None, None], size, mode="area")
                truth.append(picture.mask.ravel())
                values.append(small.numpy().ravel())
        flat = np.concatenate(truth) if truth else np.zeros(1)
        return 100 * roc_auc_score(flat, np.concatenate(values)) if flat.any() else np.nan

    def promise(self, count: int, rate: float, draws: int) -> str:
        """Promised against observed, references and test drawn from all good pictures."""
        alarms, detections, promises, rng = [], [], [], np.random.default_rng(0)
        good = [p for p in self.pictures if not p.anomalous]
        bad = [p for p in self.pictures if p.anomalous]
        for _ in range(draws):
            references = drawn(good, count, rng)
            grid = self.grid_of(references)
            looked = self.looked(references, grid)
            reference = build(looked, rate=rate, grid=grid, prior=self.prior).reference
            promises.append(reference.threshold.promised_rate)
            for group, said in ((good, alarms), (bad, detections)):
                rest = [p for p in group if p not in references]
                judged = [reference.judge(one) for one in self.looked(rest, grid)]
                said.append(
                    [
                        np.mean([one.p_value <= promises[-1] for one in judged]),
                        *(np.mean([one.verdict == kind for one in judged]) for kind in VERDICTS),
                    ]
                )
        kept, flagged, unsure = 100 * np.mean(alarms, axis=0)
        _, found, unfound = 100 * np.mean(detections, axis=0)
        low, high = interval([row[0] for row in alarms], len(good) - count)
        return (
            f"| {self.name} | {count} | {rate:.0%} | {max(promises):.0%} "
            f"| {kept:.1f} ({low:.1f} to {high:.1f}) | {flagged:.1f} / {unsure:.1f} "
            f"| {found:.1f} / {unfound:.1f} | {len(good) - count} x {draws} |"
        )


def interval(shares: list[float], pictures: int) -> tuple[float, float]:
    """95 % interval of a share in %, over draws of references and over the pictures they share."""
    share = np.mean(shares)
    near = (share * pictures + 2) / (pictures + 4)  # Agresti and Coull: none seen is not none
    error = np.sqrt(np.var(shares, ddof=1) / len(shares) + near * (1 - near) / pictures)
    reach = t.ppf(0.975, len(shares) - 1) * error
    return 100 * max(0.0, share - reach), 100 * min(1.0, share + reach)


def drawn(items: list, count: int, rng: np.random.Generator) -> list:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in sorted(rng.choice(len(items), count, replace=False))]


def auroc(anomalous: np.ndarray, scores: list[float]) -> float:
    return 100 * roc_auc_score(anomalous, scores)


def table(results: dict[str, list[list[float]]]) -> str:
    """Means over seeds with the spread of the fused score, and the mean of the products."""
    lines = [f"| set | shots | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    by_shots: dict[str, list[np.ndarray]] = {}
    for key, figures in results.items():
        name, shots = key.rsplit(" ", 1)
        mean = np.mean(figures, axis=0)
        by_shots.setdefault(shots, []).append(mean)
        cells = [f"{value:.1f}" for value in mean]
        cells[3] += f" ± {np.std(figures, axis=0)[3]:.1f}"
        lines.append(f"| {name} | {shots} | {' | '.join(cells)} |")
    for shots, means in by_shots.items():
        cells = [f"{value:.1f}" for value in np.nanmean(means, axis=0)]
        lines.append(f"| mean of {len(means)} | {shots} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.argument("datasets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), default="models/nano")
@click.option("--shots", default="1,2,4,8", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--limit", default=60, show_default=True, help="Pictures a class and split.")
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--mixed", type=int, help="Resize each picture by this seed; own cache.")
@click.option("--augment", is_flag=True, help="Add turned and mirrored copies of the references.")
@click.option("--promises", is_flag=True, help="Measure promised against observed false alarms.")
def main(datasets, model, shots, seeds, limit, cache, mixed, augment, promises):
    cache = cache if mixed is None else cache / f"mixed-{mixed}"
    cache.mkdir(parents=True, exist_ok=True)
    detector, file = Detector.from_folder(model), cache / "results.json"
    settings = {
        "expert": file_hash(model / "expert.safetensors"),
        "config": file_hash(model / "config.json"),
        "limit": limit,
        "seeds": seeds,
    }
    kept = json.loads(file.read_text()) if file.exists() else {"of": settings, "figures": {}}
    if kept.get("of") != settings:
        raise click.UsageError(f"{file} is of other settings; choose another --cache")
    results = kept["figures"]
    asked = {}
    roots = [root.resolve() for root in datasets]
    above = Path(os.path.commonpath([root.parent for root in roots]))
    for root in roots:
        for folder in products(root).values():
            label = str(folder.relative_to(above))
            setting = f"{label} augmented" if augment else label
            wanted = [f"{setting} {count}" for count in shots.split(",")]
            if promises or not set(wanted) <= set(results):
                product = Product(detector, folder, label, limit, cache, mixed)
            if promises:
                if sum(not p.anomalous for p in product.pictures) >= SPARE + 19:
                    for count, rate in ((19, 0.05), (9, 0.1), (3, 0.05)):
                        print(product.promise(count, rate, seeds), flush=True)
                continue
            for key in wanted:
                if key not in results:
                    count = int(key.rsplit(" ", 1)[1])
                    results[key] = [product.figures(count, seed, augment) for seed in range(seeds)]
                    file.write_text(json.dumps(kept))
                asked[key] = results[key]
    if asked:
        print(table(asked))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
