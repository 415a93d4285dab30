"""A checkpoint's expert, or the decoder in its place, in process as a judge of samples."""

from collections.abc import Sequence
from pathlib import Path

from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.datasets import Sample, read_sample
from looktwice_adapters.detector import Detector, Judgement, expert_file
from looktwice_adapters.few_shot import Reference, build


class ExpertJudge:
    """A checkpoint's expert as a judge of samples, against references where it is given some."""

    def __init__(self, folder: Path, decoder: Path | None = None) -> None:
        """Load the checkpoint of a folder; raises as `Detector.from_folder`."""
        self.name = folder.resolve().name + (f" with {decoder.name}" if decoder else "")
        self.detector = Detector.from_folder(folder, decoder)
        self.reference: Reference | None = None
        self.expert: str | None = file_hash(decoder or expert_file(folder))  # of what judges

    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Make the product's reference, if there are normal pictures to make it of."""
        self.reference = None
        if references:
            looked, grid = self.detector.look_alike([read_sample(one) for one in references])
            prior = self.detector.judging.config.calibration.normal_scores
            self.reference = build(looked, grid=grid, prior=prior).reference

    def judge(self, sample: Sample) -> Judgement:
        """Score, verdict and map of one sample."""
        return self.detector.judge(read_sample(sample), self.reference)

    def close(self) -> None:
        """Nothing is held open."""
