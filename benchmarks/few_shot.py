"""Few-shot figures: data sets in MVTec AD's layout -> AUROC by shots, promises kept, coreset.

`python benchmarks/few_shot.py DATASET_DIR... --cache DIR` looks at every picture once (kept in the
cache) and prints a Markdown row a product and number of shots.
"""

from pathlib import Path

import click
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from looktwice_adapters.datasets import Sample, products, read_image, read_mask, read_product
from looktwice_adapters.evaluate.detector import Detector
from looktwice_adapters.few_shot import (
    EXPERT_WEIGHT,
    PATCHES,
    Looked,
    build,
    evidence,
    image_evidence,
)

SIDE = 128  # pixels of the longer side at which maps and masks are compared
SPARE = 60  # normal pictures that a test of the promise needs


class Picture:
    """One picture as the expert saw it."""

    def __init__(self, detector: Detector, sample: Sample) -> None:
        picture = read_image(sample.path)
        self.train = sample.split == "train"
        self.anomalous = sample.anomalous
        seen = detector.look(picture)
        self.tokens, self.suspicion = [level.half() for level in seen.tokens], seen.suspicion
        self.zero_shot = detector.judge(picture).score
        self.shape = picture.shape[:2]
        factor = SIDE / max(self.shape)
        self.mask = read_mask(sample, tuple(max(1, round(s * factor)) for s in self.shape))

    @property
    def looked(self) -> Looked:
        return Looked([level.float() for level in self.tokens], self.suspicion)


def drawn(items: list, count: int, rng: np.random.Generator) -> list:
    if len(items) <= count:
        return list(items)
    return [items[i] for i in sorted(rng.choice(len(items), count, replace=False))]


def read(detector: Detector, folder: Path, name: str, limit: int, cache: Path) -> list[Picture]:
    """A product's pictures, at most `limit` of each class and split."""
    file = cache / f"{name.replace('/', '_')}_{limit}.pt"
    if file.exists():
        return torch.load(file, weights_only=False)
    groups: dict[tuple[str, bool], list[Sample]] = {}
    for sample in read_product(folder, name):
        groups.setdefault((sample.split, sample.anomalous), []).append(sample)
    rng = np.random.default_rng(0)
    chosen = [sample for group in groups.values() for sample in drawn(group, limit, rng)]
    pictures = [Picture(detector, sample) for sample in tqdm(chosen, desc=name, leave=False)]
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(pictures, file)
    return pictures


def split(pictures: list[Picture], shots: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """References by seed, of train or else of test, and the test pictures."""
    pool = [p for p in pictures if p.train] or [p for p in pictures if not p.anomalous]
    references = drawn(pool, shots, np.random.default_rng(seed))
    return references, [p for p in pictures if not p.train and p not in references]


def auroc(pictures: list[Picture], scores: list[float]) -> float:
    return 100 * roc_auc_score([p.anomalous for p in pictures], scores)


def pixel_auroc(detector: Detector, pictures: list[Picture], maps: list[torch.Tensor]) -> float:
    truth, values = [], []
    for picture, found in zip(pictures, maps, strict=True):
        if picture.mask is not None:
            whole = detector.stitched(found, np.empty((*picture.shape, 3), np.uint8))
            size = picture.mask.shape
            small = torch.nn.functional.interpolate(whole[None, None], size, mode="area")
            truth.append(picture.mask.ravel())
            values.append(small.numpy().ravel())
    flat = np.concatenate(truth) if truth else np.zeros(1)
    return 100 * roc_auc_score(flat, np.concatenate(values)) if flat.any() else float("nan")


def row(detector: Detector, name: str, pictures: list[Picture], shots: int, seeds: int) -> str:
    """Mean and spread over seeds of one number of shots."""
    figures = []
    for seed in range(seeds):
        references, test = split(pictures, shots, seed)
        reference = build([p.looked for p in references]).reference
        found = [evidence(reference.bank, p.looked) for p in test]
        plain = [one - EXPERT_WEIGHT * p.suspicion for one, p in zip(found, test, strict=True)]
        fused = [image_evidence(one) for one in found]
        thin = build([p.looked for p in references], patches=len(reference.bank) // 10).reference
        verdicts = [reference.threshold.verdict(value) for value in fused]
        good = [v for v, p in zip(verdicts, test, strict=True) if not p.anomalous]
        bad = [v for v, p in zip(verdicts, test, strict=True) if p.anomalous]
        figures.append(
            (
                auroc(test, [p.zero_shot for p in test]),
                auroc(test, [image_evidence(one) for one in plain]),
                auroc(test, fused),
                auroc(test, [image_evidence(evidence(thin.bank, p.looked)) for p in test]),
                pixel_auroc(detector, test, found),
                *(100 * np.mean([v == kind for v in good]) for kind in ("anomalous", "undecided")),
                *(100 * np.mean([v == kind for v in bad]) for kind in ("anomalous", "undecided")),
            )
        )
    mean, spread = np.mean(figures, axis=0), np.std(figures, axis=0)
    alone, plain, fused, thin, pixel, *rest = (f"{value:.1f}" for value in mean)
    return (
        f"| {name} | {shots} | {alone} | {plain} | {fused} ± {spread[2]:.1f} | {thin} | {pixel} "
        f"| {' | '.join(rest)} |"
    )


def promise(name: str, pictures: list[Picture], rate: float, seeds: int) -> str:
    """Promised against observed false alarms, references and test drawn from all good ones."""
    alarms, detections, rng = [], [], np.random.default_rng(0)
    count = round(1 / rate) - 1
    good = [p for p in pictures if not p.anomalous]
    bad = [p for p in pictures if p.anomalous]
    for _ in range(seeds):
        references = drawn(good, count, rng)
        reference = build([p.looked for p in references], rate=rate).reference
        for group, said in ((good, alarms), (bad, detections)):
            rest = [p for p in group if p not in references]
            said.append([reference.judge(p.looked).verdict == "anomalous" for p in rest])
    share = [np.mean(one) for one in alarms]
    n = len(alarms[0])
    half = 1.96 * np.sqrt(np.mean(share) * (1 - np.mean(share)) / n)
    return (
        f"| {name} | {count} | {100 * rate:.0f} | {100 * np.mean(share):.1f} "
        f"({100 * max(0, np.mean(share) - half):.1f} to {100 * (np.mean(share) + half):.1f}) "
        f"| {100 * np.mean([np.mean(one) for one in detections]):.1f} | {n} x {seeds} |"
    )


@click.command()
@click.argument("datasets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), default="models/nano")
@click.option("--shots", default="1,2,4,8", show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--limit", default=60, show_default=True, help="Pictures a class and split.")
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--promises", is_flag=True, help="Measure promised against observed false alarms.")
def main(datasets, model, shots, seeds, limit, cache, promises):
    detector = Detector.from_folder(model)
    for root in datasets:
        for name, folder in products(root.resolve()).items():
            label = name if name == root.resolve().name else f"{root.resolve().name}/{name}"
            pictures = read(detector, folder, label, limit, cache)
            with torch.inference_mode():
                if promises:
                    if sum(not p.anomalous for p in pictures) < SPARE + 19:
                        continue
                    for rate in (0.05, 0.1):
                        print(promise(label, pictures, rate, seeds), flush=True)
                    continue
                for count in map(int, shots.split(",")):
                    print(row(detector, label, pictures, count, seeds), flush=True)


if __name__ == "__main__":
    print(f"bank of at most {PATCHES} patches", flush=True)
    main()
