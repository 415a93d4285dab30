"""A judge: a sample -> anomaly score, verdict and anomaly map, after a look at K normal pictures.

What `looktwice evaluate` measures is a judge: the expert in process, a server, or a baseline.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from looktwice_adapters.datasets import NORMAL, Sample
from looktwice_adapters.detector import Judgement

T = TypeVar("T")


class Judge(Protocol):
    """Judges the pictures of one product after another."""

    name: str

    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Get ready for a product, with its normal reference pictures (none: zero-shot).

        Raises:
            ReferencesError: this judge cannot use them, or cannot do without.
        """

    def judge(self, sample: Sample) -> Judgement:
        """Judge one picture of the product."""

    def close(self) -> None:
        """Let go of what is held, on a server too."""


class ReferencesError(ValueError):
    """A judge was given references that it cannot use, or none where it needs some."""


def split(samples: Sequence[Sample], shots: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """References and test pictures of a product.

    Args:
        samples: all of the product's, train and test, at least one of test.
        shots: how many references; 0 for none.
        seed: which ones.

    Returns:
        `shots` normal pictures of train, or where there is no train of test, which then leave
        the test; and the test pictures.

    Raises:
        ValueError: there are too few normal pictures, or no others to test.
    """
    test = [sample for sample in samples if sample.split == "test"]
    train = [sample for sample in samples if sample.split == "train" and not sample.anomalous]
    pool = train or [sample for sample in test if not sample.anomalous]
    if shots > len(pool):
        where = "train" if train else "test"
        raise ValueError(
            f"{test[0].product} has {len(pool)} pictures in {where}/{NORMAL}, --shots {shots}"
        )
    references = drawn(pool, shots, seed)
    files = {sample.path for sample in references}  # other tiles of a strip are no test for it
    left = [sample for sample in test if sample.path not in files]
    if not left:
        raise ValueError(f"{test[0].product} has no test pictures left after --shots {shots}")
    return references, left


def drawn(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of the items, by seed, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), limit, replace=False)
    return [items[index] for index in sorted(chosen)]
