"""One product's test pictures and a judge -> what was said of each, and the figures."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from looktwice_adapters.bootstrap import Draws, PixelCurves, draw, intervals, mean_draws
from looktwice_adapters.datasets import Sample, read_mask, read_sample
from looktwice_adapters.evaluate.judge import Judge
from looktwice_adapters.metrics import (
    Decisions,
    Labels,
    Maps,
    Masks,
    Metrics,
    calibration_error,
    decision_metrics,
    image_metrics,
    mean_of,
    pixel_metrics,
    shortcut,
    trivial_statistics,
)

LONGEST = 256  # pixels a side at which maps and masks are compared; nano's map has 28 tokens
SHOWN, MOST_WRONG = 2, 4  # at most so many telling cases of each class, and wrong ones besides


@dataclass(frozen=True)
class Case:
    """What was said of one test picture."""

    sample: Sample
    score: float
    verdict: str | None
    anomaly_map: NDArray[np.float32] | None  # (h, w), the longer side at most LONGEST
    mask: NDArray[np.bool_] | None  # of the map's size
    answer: str | None = None  # words, where the question was asked
    answered_yes: bool | None = None  # None: not asked, or neither yes nor no

    @property
    def wrong(self) -> bool:
        """Whether there is a verdict, and it is not the label's."""
        return self.verdict not in (None, "anomalous" if self.sample.anomalous else "normal")


def telling(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Title -> the cases of one product that say most about a judge, none twice."""
    anomalous = sorted((c for c in cases if c.sample.anomalous), key=lambda case: -case.score)
    normal = sorted((c for c in cases if not c.sample.anomalous), key=lambda case: case.score)
    groups = {
        "highest of the anomalous": anomalous[:SHOWN],
        "lowest of the normal": normal[:SHOWN],
        "lowest of the anomalous": anomalous[::-1][:SHOWN],
        "highest of the normal": normal[::-1][:SHOWN],
        "wrong verdict": [case for case in (*anomalous[::-1], *normal[::-1]) if case.wrong],
    }
    taken: list[Case] = []
    for title, members in groups.items():
        fresh = [case for case in members if all(case is not other for other in taken)]
        groups[title] = fresh[:MOST_WRONG]
        taken += groups[title]
    return groups


@dataclass(frozen=True)
class ProductResult:
    """A judge's figures on one product."""

    metrics: Metrics
    draws: Draws
    cases: list[Case]  # the telling ones with map and mask, the others without


Asked = tuple[str, bool | None]  # the answer's words, and whether they say yes


def run_product(
    judge: Judge,
    samples: Sequence[Sample],
    references: Sequence[Sample],
    ask: Callable[[Sample], Asked] | None,
) -> list[Case]:
    """Judge the samples one by one, with a progress bar.

    Args:
        judge: whose figures these are.
        samples: test pictures of one product, at least one.
        references: its normal pictures; none for zero-shot.
        ask: whether there is a defect, in words; None to ask nothing.
    """
    product = samples[0].product
    judge.prepare(product, references)
    bar = tqdm(
        samples, f"{judge.name}: {product}", unit="image", leave=False, delay=2, disable=None
    )
    return [_case(judge, sample, ask) for sample in bar]


def _case(judge: Judge, sample: Sample, ask: Callable[[Sample], Asked] | None) -> Case:
    judgement = judge.judge(sample)
    answer, answered_yes = ask(sample) if ask else (None, None)
    if judgement.anomaly_map is None:
        return Case(sample, judgement.score, judgement.verdict, None, None, answer, answered_yes)
    height, width = read_sample(sample).shape[:2]
    factor = min(1.0, LONGEST / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    resized = np.asarray(cv2.resize(judgement.anomaly_map, size[::-1]), np.float32)
    mask = read_mask(sample, size)
    return Case(sample, judgement.score, judgement.verdict, resized, mask, answer, answered_yes)


def measure(cases: Sequence[Case], draws: int = 1000, seed: int = 0) -> ProductResult:
    """Every figure that the cases of one product give, with its bootstrap intervals.

    Pictures are drawn by seed and the product's name: alike for every judge, so that judges can be
    compared draw by draw, and unlike for products, whose draws must be independent in the mean.
    """
    seeds = [seed, crc32(os.fsencode(cases[0].sample.product))]
    labels = np.array([case.sample.anomalous for case in cases])
    figures = _image_figures(cases)
    everybody = np.arange(len(cases))
    files = [case.sample.path for case in cases]
    drawn = draw(labels, figures, draws, seeds, files)
    masks, maps, has_map = _pixels(cases)
    pixels = pixel_metrics(masks, maps)
    if pixels["pixel_auroc"] is not None:
        curves = PixelCurves.of(masks, maps)
        mapped = [file for file, has in zip(files, has_map, strict=True) if has]
        drawn |= draw(labels[has_map], curves.figures, draws, seeds, mapped)
    statistics = [trivial_statistics(case.sample) for case in cases]
    metrics = Metrics(
        **figures(everybody),  # type: ignore[arg-type]
        **pixels,  # type: ignore[arg-type]
        **shortcut(labels, statistics),  # type: ignore[arg-type]
        n_normal=int((~labels).sum()),
        n_anomalous=int(labels.sum()),
        intervals=intervals(drawn),
    )
    return ProductResult(metrics, drawn, _thinned(cases))


def _thinned(cases: Sequence[Case]) -> list[Case]:
    """Maps of all pictures of all sets would not fit into memory."""
    kept = {id(case) for members in telling(cases).values() for case in members}
    return [
        case if id(case) in kept else replace(case, anomaly_map=None, mask=None) for case in cases
    ]


def mean_result(results: Sequence[ProductResult]) -> Metrics:
    """The macro mean over products, with its intervals."""
    mean = mean_of([result.metrics for result in results])
    drawn = [
        {name: d for name, d in r.draws.items() if getattr(r.metrics, name) is not None}
        for r in results
    ]
    mean.intervals.update(intervals(mean_draws(drawn)))
    return mean


def _image_figures(
    cases: Sequence[Case],
) -> Callable[[NDArray[np.int64]], dict[str, float | None]]:
    """A function from indices of cases to their image figures."""
    labels: Labels = np.array([case.sample.anomalous for case in cases])
    scores = np.array([case.score for case in cases], np.float64)
    verdicts = _decisions([_VERDICTS.get(case.verdict or "") for case in cases])
    answers = _decisions([case.answered_yes for case in cases])
    judged = any(case.verdict is not None for case in cases)
    asked = any(case.answer is not None for case in cases)

    def figures(chosen: NDArray[np.int64]) -> dict[str, float | None]:
        truth = labels[chosen]
        found = image_metrics(truth, scores[chosen])
        if judged:
            found |= decision_metrics(truth, verdicts[chosen], "verdict")
            found["ece"] = calibration_error(truth, scores[chosen])
        if asked:
            found |= decision_metrics(truth, answers[chosen], "answer")
        return found

    return figures


_VERDICTS = {"anomalous": True, "normal": False}


def _decisions(said: Sequence[bool | None]) -> Decisions:
    return np.array([np.nan if yes is None else yes for yes in said], np.float64)


def _pixels(cases: Sequence[Case]) -> tuple[Masks, Maps, NDArray[np.bool_]]:
    """Masks and maps of the cases that have both, and which those are."""
    pairs = [(case.mask, case.anomaly_map) if case.mask is not None else None for case in cases]
    masks = [pair[0] for pair in pairs if pair and pair[1] is not None]
    maps = [pair[1] for pair in pairs if pair and pair[1] is not None]
    return masks, maps, np.array([pair is not None for pair in pairs])
