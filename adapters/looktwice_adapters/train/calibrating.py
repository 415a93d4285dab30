"""Fitting a calibration: a detector and labelled data sets -> its threshold and scales.

For the expert and for AnomalyGPT's decoder alike, after training and on other pictures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from looktwice_adapters.calibration import calibrate
from looktwice_adapters.checkpoint import ExpertFileError
from looktwice_adapters.datasets import Sample, read_mask, read_sample
from looktwice_adapters.detector import CheckpointError, Detector, expert_file
from looktwice_adapters.expert import detail_logit
from looktwice_adapters.few_shot import normal_scores
from looktwice_adapters.layouts import read_dataset
from looktwice_adapters.train.features import lacking_class
from looktwice_adapters.train.hub_format import write_json
from looktwice_adapters.train.options import calibrate_on_option, seed_option

IMAGES = 40  # of each class of each product
GOOD_IMAGES = 12  # of a product, that are compared with each other


def fit_calibration(detector: Detector, folders: tuple[Path, ...], seed: int) -> None:
    """Fit the calibration of what a detector judges by, which from here on judges with it.

    Of the test pictures at most `IMAGES` of each class of each product are drawn, by seed. What
    scores of good pictures look like is told by products that have enough of them, where there are
    two or more.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        (str(root.resolve()), _drawn(samples, rng))
        for root in folders
        for samples in read_dataset(root).values()
    ]
    named = [(name, sample) for name, samples in drawn for sample in samples]
    scores, significant, peaks, pixels, covered = [], [], [], [], []
    for _, sample in tqdm(named, desc="calibration", unit="image"):
        score, significance, whole = detector.raw(read_sample(sample))
        scores.append(score)
        significant.append(detail_logit(significance))
        peaks.append(whole.max())
        mask = read_mask(sample, (whole.shape[0], whole.shape[1]))
        if mask is not None:
            pixels.append(whole[4::8, 4::8].flatten())
            covered.append(torch.from_numpy(mask[4::8, 4::8].copy()).flatten())
    fitted = calibrate(
        torch.stack(scores),
        torch.stack(significant),
        np.array([sample.anomalous for _, sample in named]),
        np.array([root for root, _ in named]),
        torch.stack(peaks),
        torch.cat(pixels),
        torch.cat(covered),
    )
    judging = detector.judging
    # Kept where these sets are too few to measure them.
    fitted = replace(fitted, normal_scores=judging.config.calibration.normal_scores)
    judging.config = replace(judging.config, calibration=fitted)
    good = [[s for s in samples if not s.anomalous][:GOOD_IMAGES] for _, samples in drawn]
    good = [samples for samples in good if len(samples) == GOOD_IMAGES]
    if len(good) < 2:
        return
    looked = [
        detector.look_alike([read_sample(sample) for sample in samples])[0]
        for samples in tqdm(good, desc="references", unit="product")
    ]
    fitted = replace(fitted, normal_scores=normal_scores(looked))
    judging.config = replace(judging.config, calibration=fitted)


def check_calibrating(folders: tuple[Path, ...]) -> None:
    """Refuse, before anything is trained, data sets that `fit_calibration` cannot use.

    Raises:
        click.UsageError: a folder is not a data set, or its test pictures are all of one class.
    """
    for root in folders:
        try:
            products = read_dataset(root).values()
        except ValueError as error:
            raise click.UsageError(f"--calibrate-on {error}") from error
        test = [sample for samples in products for sample in samples if sample.split == "test"]
        if lacking := lacking_class(test):
            raise click.UsageError(f"--calibrate-on {root}: it has no {lacking} test pictures")


def _drawn(samples: list[Sample], rng: np.random.Generator) -> list[Sample]:
    chosen: list[Sample] = []
    for anomalous in (False, True):
        of_class = [s for s in samples if s.split == "test" and s.anomalous == anomalous]
        chosen += [of_class[index] for index in rng.permutation(len(of_class))[:IMAGES]]
    return chosen


@click.command("calibrate")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@calibrate_on_option(required=True)
@seed_option("Of which pictures are drawn.")
def calibration(checkpoint: Path, calibrate_on: tuple[Path, ...], seed: int) -> None:
    """Fit the threshold of a checkpoint's expert anew, on labelled pictures of your own.

    Writes the calibration into config.json of the folder CHECKPOINT, and into the expert's JSON
    file where there is one. Weights stay. References that were added before must be added again.
    """
    check_calibrating(calibrate_on)
    try:
        detector = Detector.from_folder(checkpoint)
    except (CheckpointError, ExpertFileError) as error:
        raise click.UsageError(str(error)) from error
    try:
        fit_calibration(detector, calibrate_on, seed)
    except (OSError, ValueError) as error:  # a picture or mask that cannot be read
        raise click.ClickException(str(error)) from error
    fitted = asdict(detector.expert.config.calibration)
    config = json.loads((checkpoint / "config.json").read_text())
    config["anomaly_expert"]["calibration"] = fitted
    beside = expert_file(checkpoint).with_suffix(".json")
    if beside.exists():
        write_json(beside, json.loads(beside.read_text()) | {"calibration": fitted})
    write_json(checkpoint / "config.json", config)
    click.echo(f"{checkpoint / 'config.json'}: {json.dumps(fitted)}")
