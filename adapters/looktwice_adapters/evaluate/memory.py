"""The memory bank alone as a judge: K normal pictures -> distance to their nearest patch.

AnomalyGPT's few-shot map on the tower of a checkpoint's expert, without the expert:
what the references bring by themselves. Distances have no threshold, so that there is no verdict.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from looktwice_adapters.checkpoint import ExpertFileError
from looktwice_adapters.datasets import Sample, read_sample
from looktwice_adapters.detector import CheckpointError, Detector, Judgement, shipped_checkpoint
from looktwice_adapters.evaluate.baselines import BaselineError
from looktwice_adapters.evaluate.judge import ReferencesError
from looktwice_adapters.few_shot import image_evidence
from looktwice_adapters.memory_bank import MemoryBank
from looktwice_adapters.recut import Grid


class MemoryJudge:
    """Judges by the mean of the strongest 2 % of a picture's distances."""

    def __init__(self, folder: str) -> None:
        """Load the tower of a checkpoint folder, the shipped one's where empty.

        Raises:
            BaselineError: it holds no checkpoint with an expert, or its weights do not fit.
        """
        try:
            path = Path(folder) if folder else shipped_checkpoint()
            self.detector = Detector.from_folder(path)
        except (CheckpointError, ExpertFileError) as error:
            raise BaselineError(str(error)) from error
        self.name = f"memory bank of {path.resolve().name}"
        self.bank: MemoryBank | None = None
        self.grid: Grid | None = None  # that the references are cut on

    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Fill the bank with every patch of the references.

        Raises:
            ReferencesError: there are none.
        """
        if not references:
            raise ReferencesError("the memory bank needs --shots 1 or more")
        looked, self.grid = self.detector.look_alike([read_sample(one) for one in references])
        self.bank = MemoryBank.of([one.tokens for one in looked])

    @torch.inference_mode()
    def judge(self, sample: Sample) -> Judgement:
        """Distance of the picture, and of each place."""
        assert self.bank is not None  # prepared
        picture = read_sample(sample)
        looked = self.detector.look(picture, self.grid)
        distance = self.bank.distances(looked.tokens).view_as(looked.suspicion)
        own = self.detector.cut(picture).back(distance, self.grid)
        whole = self.detector.stitched(own, picture).numpy()
        return Judgement(image_evidence(distance), None, whole)

    def close(self) -> None:
        """Nothing is held open."""
