"""Few-shot detection: a product's memory bank beside the zero-shot expert -> one map, one verdict.

AnomalyGPT (AAAI 2024) scores a patch by its distance to the bank; here the logarithm of that
distance and the expert's own suspicion add up, patch by patch, so that score, map, regions,
suspicious tokens and adverb all follow the same evidence. What was chosen, and on which data,
stands in docs/references.md.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from looktwice_adapters.expert import PEAK_SHARE, AnomalyExpert, Calibration
from looktwice_adapters.facts import Verdict
from looktwice_adapters.memory_bank import MemoryBank, ReferenceTokens
from looktwice_adapters.recut import Grid
from looktwice_adapters.threshold import NORMAL, NormalScores, Threshold, outliers

SMALLEST_DISTANCE = 0.01  # nearer is the same patch
EXPERT_WEIGHT = 0.05  # of the expert's calibrated logit, beside the logarithm of the distance
EXPERT_LIMIT = 6.0  # of that logit: beyond, it says nothing more
SLOPE = 10.0  # of the calibrated logit, a unit of evidence
PATCHES = 4096  # of a bank; more is thinned
FEW = 4  # pictures of a product that are each the only reference once


class Looked(NamedTuple):
    """What the expert saw of one picture."""

    tokens: list[Tensor]  # L of (B, N, C_l)
    suspicion: Tensor  # (B, h, w) logit of the expert's calibrated map


class FewShotJudgement(NamedTuple):
    """What a reference and the expert say of one picture."""

    anomaly_map: Tensor  # (B, h, w) calibrated, in [0, 1]
    score: float  # calibrated, in [0, 1]; above 0.5, not at it, is anomalous
    p_value: float | None  # None: no good picture has a score to compare with
    verdict: Verdict


def look(
    expert: AnomalyExpert, levels: list[Tensor], significance: Tensor, calibration: Calibration
) -> Looked:
    """What few-shot detection needs of a picture that the expert looks at.

    Args:
        expert: whose tower made the levels.
        levels: L tensors (B, N, C_l), float32.
        significance: (B, h, w), the expert's map.
        calibration: of that map.
    """
    suspicion = torch.logit(calibration.map(significance), 1e-6)
    return Looked(expert.patch_tokens(levels), suspicion.clamp(-EXPERT_LIMIT, EXPERT_LIMIT))


def turns(crops: Tensor) -> list[Tensor]:
    """Crops (B, 3, S, S) turned by 90, 180 and 270 degrees, and mirrored (AnomalyGPT's copies)."""
    return [*(crops.rot90(quarter, (2, 3)) for quarter in (1, 2, 3)), crops.flip(3)]


def evidence(bank: MemoryBank, picture: Looked) -> Tensor:
    """How much speaks for a defect at each patch: (B, h, w)."""
    distance = bank.distances(picture.tokens).view_as(picture.suspicion)
    return distance.clamp_min(SMALLEST_DISTANCE).log() + EXPERT_WEIGHT * picture.suspicion


def image_evidence(evidence: Tensor) -> float:
    """The picture's: mean of the strongest 2 % of the base view's patches and of the crops'.

    Args:
        evidence: (B, h, w), the base view first: one shows the whole part, the others details.
    """
    views = (evidence[:1].flatten(), evidence[1:].flatten())
    peaks = [view.topk(max(1, round(PEAK_SHARE * len(view)))).values.mean() for view in views]
    return float(sum(peaks) / 2)


@dataclass(frozen=True)
class Reference:
    """A product's normal images: their memory bank and the threshold that they set."""

    bank: MemoryBank
    threshold: Threshold
    grid: Grid | None = None  # that its pictures, and those it judges, are cut on; None: any

    def judge(self, picture: Looked) -> FewShotJudgement:
        """Calibrated map and score, p-value and verdict of a picture."""
        found = evidence(self.bank, picture)
        value = image_evidence(found)
        score = torch.tensor(SLOPE * (value - self.threshold.value), dtype=torch.float64)
        return FewShotJudgement(
            torch.sigmoid(SLOPE * (found - self.threshold.value)),
            float(score.sigmoid()),
            self.threshold.p_value(value),
            self.threshold.verdict(value),
        )

    def to(self, device: torch.device) -> "Reference":
        """The reference with its bank on another device."""
        return replace(self, bank=self.bank.to(device))

    def encode(self, notes: dict[str, Any], **tensors: Tensor) -> bytes:
        """A safetensors file with bank and threshold.

        Args:
            notes: what JSON can hold, kept in the file's header.
            tensors: kept beside the bank.
        """
        levels = {f"level.{i}": level.half() for i, level in enumerate(self.bank.levels)}
        # One key: the file's writer puts several in any order, and equal files have equal names.
        notes = notes | {"threshold": asdict(self.threshold), "grid": self.grid}
        header = {"reference": json.dumps(notes)}
        data = {name: value.contiguous() for name, value in (levels | tensors).items()}
        return save(data, header)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The reference in a file that `encode` made.

        Raises:
            OSError, ValueError, KeyError, SafetensorError: it cannot be read, or is none.
        """
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("level.")]
            bank = MemoryBank(tuple(file.get_tensor(f"level.{i}") for i in range(len(names))))
            notes = json.loads(file.metadata()["reference"])
        threshold = notes["threshold"]
        grid = notes["grid"]
        return cls(
            bank,
            Threshold(**threshold | {"scores": tuple(threshold["scores"])}),
            None if grid is None else (grid[0], grid[1]),
        )


def common_grid(grids: Sequence[Grid]) -> Grid:
    """What most of a reference's pictures are cut on; of equally many the one of more crops."""
    count = Counter(grids)
    return max(count, key=lambda grid: (count[grid], grid[0] * grid[1], grid))


class Built(NamedTuple):
    """A reference, and what its maker should know."""

    reference: Reference
    images: int  # different ones among the normal images
    warnings: list[str]


def build(
    images: Sequence[Looked],
    *,
    rate: float = 0.05,
    calibration: Sequence[Looked] = (),
    defects: Sequence[Looked] = (),
    copies: Sequence[list[Tensor]] = (),
    grid: Grid | None = None,
    patches: int = PATCHES,
    prior: NormalScores = NORMAL,
) -> Built:
    """A product's reference from its normal images.

    Args:
        images: normal images, for bank and threshold.
        rate: false alarms among good pictures that the user accepts, in (0, 1).
        calibration: more normal images, for the threshold alone.
        defects: known defects; they can only make the threshold stricter.
        copies: of each image the tokens of its turned and mirrored copies, which leave with it.
        grid: that all of them were cut on.
        patches: size of the bank.
        prior: what scores of good pictures look like, by the calibration of who suspects.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("a reference needs at least one normal image")
    given = [*images, *calibration]
    twins = _twins(given)
    numbers = [number for number in range(len(images)) if number not in twins]
    more = [number for number in range(len(images), len(given)) if number not in twins]
    # As the wire's requests and errors address them: clients find the files behind these.
    names = [f"images[{number}]" for number in range(len(images))]
    names += [f"calibration_images[{number}]" for number in range(len(calibration))]
    images, calibration = ([given[number] for number in group] for group in (numbers, more))
    copies = [copies[number] for number in numbers] if copies else ()
    tokens, owners = [image.tokens for image in images], list(range(len(images)))
    if copies:
        tokens = [part for pair in zip(tokens, copies, strict=True) for part in pair]
        owners = [owner for owner in owners for _ in range(2)]
    reference_tokens = ReferenceTokens.of(tokens, owners, size=patches)
    bank = reference_tokens.bank().to(dtype=torch.half)
    own = [
        image_evidence(evidence(reference_tokens.bank(index).to(dtype=torch.half), image))
        for index, image in enumerate(images)
        if len(images) > 1
    ]
    others = [
        [image_evidence(evidence(bank, p)) for p in group] for group in (calibration, defects)
    ]
    threshold = Threshold.fit(own, rate, calibration=others[0], defects=others[1], prior=prior)
    said = [
        f"{names[number]} is the same picture as {names[first]} and was left out"
        for number, first in twins.items()
    ]
    said += [
        f"{names[numbers[index]]} looks unlike the others: is it broken, or of another product?"
        for index in outliers(own, prior.deviation)
    ]
    said += _warnings(others[1], threshold)
    return Built(Reference(bank, threshold, grid), len(images), said)


def normal_scores(products: Sequence[Sequence[Looked]]) -> NormalScores:
    """What scores of good pictures look like, of some products' good pictures.

    A few pictures of each product are its only reference in turn, and judge its other ones.

    Args:
        products: two or more, of three or more good pictures each.
    """
    means, deviations = [], []
    for pictures in products:
        for number, alone in enumerate(pictures[:FEW]):
            bank = MemoryBank.of([alone.tokens]).to(dtype=torch.half)
            others = [one for index, one in enumerate(pictures) if index != number]
            scores = torch.tensor([image_evidence(evidence(bank, one)) for one in others])
            means.append(float(scores.mean()))
            deviations.append(float(scores.std()))
    of_products = torch.tensor(means).split([min(FEW, len(one)) for one in products])
    centres = torch.stack([part.mean() for part in of_products])
    return NormalScores(
        mean=float(centres.mean()),
        between=float(centres.std()),
        products=len(products),
        deviation=float(torch.tensor(deviations).median()),
    )


def _twins(images: Sequence[Looked]) -> dict[int, int]:
    """Images that are another one again, each with the first of its kind.

    A picture is its twin's likeness, in the bank or out of it: the threshold would be too low.
    Tokens tell them apart; maps do not, which are the same wherever nothing is suspicious.
    """
    first: dict[bytes, int] = {}
    keys = [sha256(image.tokens[0].cpu().numpy().tobytes()).digest() for image in images]
    found = {index: first.setdefault(key, index) for index, key in enumerate(keys)}
    return {index: number for index, number in found.items() if index != number}


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}%"


def _warnings(defects: list[float], threshold: Threshold) -> list[str]:
    """What a threshold cannot do."""
    said = []
    if threshold.promised_rate > threshold.rate:
        needed = math.ceil(1 / threshold.rate - 1e-9) - 1
        count = len(threshold.scores)
        promise = "1 good picture promises" if count == 1 else f"{count} good pictures promise"
        promise += f" a false-alarm rate of {_percent(threshold.promised_rate)} at best"
        promise += f" (guaranteed: {_percent(threshold.guaranteed_rate)})"
        if not count:
            promise = "a single good picture cannot promise a false-alarm rate"
        said.append(f"{promise}; {_percent(threshold.rate)} needs {needed}")
    if missed := sum(value <= threshold.value for value in defects):
        said.append(f"{missed} of {len(defects)} known defects are below the threshold")
    return said
