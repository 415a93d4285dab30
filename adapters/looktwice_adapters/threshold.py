"""Threshold from good pictures alone: their anomaly scores -> p-value and verdict of another one.

Every reference is scored as if it had not been given (leave-one-out; its augmented copies leave
with it). The p-value of a picture is the share of good ones that score at least as high, itself
counted: what n good pictures can promise is a false-alarm rate of 1 / (n + 1) and no better.

The guarantee is the jackknife+'s (Barber et al., 2021, theorem 1): a good picture gets a p-value of
`rate` or below with probability 2 * rate at most, whatever the distribution, and of about `rate` in
practice. The theorem is about p-values against the bank without each reference in turn; the whole
bank can only bring a picture nearer to its neighbours, so ours are never smaller. Extra good
pictures that are not in the bank promise `rate` itself (split conformal prediction); where they
are enough for the asked rate, they alone are counted. Where both are counted together neither
theorem holds as it stands; the factor two is then the safe reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Self

import numpy as np
from scipy.stats import t as student

from looktwice_adapters.facts import Verdict

OUTLIER = 4.0  # deviations above the other references


@dataclass(frozen=True)
class NormalScores:
    """What scores of good pictures look like before many of a product were seen."""

    mean: float = 0.0  # over products
    between: float = 1.0  # deviation of the products' means
    products: int = 4  # that both were measured on
    deviation: float = 1.0  # within a product
    degrees: float = 3.0  # how many pictures the deviation counts as

    def limit(self, scores: Sequence[float], rate: float) -> float:
        """What the next good picture's score exceeds with probability `rate`, were they normal.

        Student's t about the product's own mean; the deviation is the product's and this prior's
        together, so that two alike pictures do not make a narrow one. Without scores, the limit
        of another product than those measured. A score far below the others is a picture sent
        twice, and is moved up.
        """
        if not scores:
            spread = hypot(self.between, self.deviation) * sqrt(1 + 1 / self.products)
            return self.mean + spread * float(student.ppf(1 - rate, self.products - 1))
        n = len(scores)
        values = np.maximum(scores, np.median(scores) - OUTLIER * self.deviation)
        degrees = self.degrees + n - 1
        squares = self.degrees * self.deviation**2 + n * float(values.var())
        spread = sqrt(squares / degrees * (1 + 1 / n))
        return float(values.mean()) + spread * float(student.ppf(1 - rate, degrees))


NORMAL = NormalScores(mean=-1.58, between=0.26, deviation=0.1)  # where a checkpoint tells none


@dataclass(frozen=True)
class Threshold:
    """Where a product's verdict flips, and what that promises."""

    scores: tuple[float, ...]  # of good pictures, each judged without itself, ascending
    value: float  # a score above it is anomalous
    rate: float  # false-alarm rate that was asked for
    split: bool = False  # no score is of a picture in the bank (split conformal)

    @classmethod
    def fit(
        cls,
        references: Sequence[float],
        rate: float = 0.05,
        *,
        calibration: Sequence[float] = (),
        defects: Sequence[float] = (),
        prior: NormalScores,
    ) -> Self:
        """The threshold of a product.

        Where the good pictures are too few for the asked rate, the threshold lies where the next
        good picture would be found with probability `rate` if scores were normal, never below the
        highest of the good ones, or where a single one has no score the mean that the prior
        expects; between the two a picture is undecided. Known defects can only lower that
        estimate, to halfway between the good ones and the median defect.

        Args:
            references: leave-one-out scores of the bank's images.
            rate: false alarms among good pictures, in (0, 1).
            calibration: scores of good pictures that are not in the bank.
            defects: scores of known defects.
            prior: of scores of good pictures.
        """
        enough = len(calibration) and cls._enough(len(calibration), rate)
        split = enough or not len(references)
        scores = tuple(sorted(calibration if split else (*references, *calibration)))
        if cls._enough(len(scores), rate):
            allowed = int(rate * (len(scores) + 1) + 1e-9)  # scores at or above: at most this - 1
            return cls(scores, scores[len(scores) - allowed], rate, split)
        value = prior.limit(scores, rate)
        floor = max(scores, default=prior.mean)
        if len(defects):
            value = min(value, (floor + float(np.median(defects))) / 2)
        return cls(scores, max(floor, value), rate, split)

    @staticmethod
    def _enough(count: int, rate: float) -> bool:
        return (count + 1) * rate >= 1 - 1e-9

    @property
    def promised_rate(self) -> float:
        """The smallest false-alarm rate at or above the asked one that so few can promise."""
        return max(self.rate, 1 / (len(self.scores) + 1))

    @property
    def guaranteed_rate(self) -> float:
        """The false-alarm rate that the promised one is at most, whatever the distribution.

        Twice as high where references judged each other (jackknife+).
        """
        return min(1.0, (1 if self.split else 2) * self.promised_rate)

    def p_value(self, score: float) -> float | None:
        """Share of good pictures, the judged one counted, that score at least as high.

        None where no good picture has a score, as of a single reference.
        """
        if not self.scores:
            return None
        return (1 + sum(good >= score for good in self.scores)) / (len(self.scores) + 1)

    def verdict(self, score: float) -> Verdict:
        """Anomalous above the threshold; undecided where only a higher rate could be promised.

        Not at it: the good picture that scores the same counts in the p-value.
        """
        if score > self.value:
            return "anomalous"
        unlike_all = bool(self.scores) and score > self.scores[-1]
        return "undecided" if unlike_all and self.promised_rate > self.rate else "normal"


def outliers(scores: Sequence[float], deviation: float) -> list[int]:
    """Indices of scores far above the others': a broken picture, or another product's.

    Args:
        scores: leave-one-out scores of the references, at least three.
        deviation: the smallest that good pictures' scores have; a product's own median deviation
            counts where it is larger.
    """
    if len(scores) < 3:
        return []
    values = np.asarray(scores)
    centre = np.median(values)
    spread = max(deviation, 1.4826 * float(np.median(np.abs(values - centre))))
    return [int(index) for index in np.flatnonzero(values > centre + OUTLIER * spread)]
