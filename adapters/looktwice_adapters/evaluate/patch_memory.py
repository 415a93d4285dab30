"""PatchCore and PaDiM as judges: K normal pictures -> how far a picture's patches lie from theirs.

The models are anomalib's. Their distances have no scale of their own, so that there is no verdict.
"""

from collections.abc import Sequence

import numpy as np
import torch
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from looktwice_adapters.datasets import Sample, read_sample
from looktwice_adapters.detector import Judgement
from looktwice_adapters.evaluate.baselines import RANDOM, BaselineError, first_line
from looktwice_adapters.evaluate.judge import ReferencesError
from looktwice_adapters.memory_bank import coreset
from looktwice_adapters.towers import lite0_weights, load_lite0

LITE0 = "tf_efficientnet_lite0"
SIDE = 256
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
# Stages of a timm network: of strides 8 and 16, and of 4, 8 and 16, as published.
PATCHCORE_STAGES, PADIM_STAGES = (2, 3), (1, 2, 3)
CORESET = 0.1  # share of the patches that PatchCore keeps, as published
CORESET_FROM = 16  # references: of fewer every patch is kept
PADIM_CHANNELS = 100  # drawn at random, as published for the smaller network


class PatchMemoryJudge:
    """PatchCore (Roth et al., CVPR 2022) or PaDiM (Defard et al., 2020), fitted product by product.

    PatchCore: distance to the nearest patch of the references. PaDiM: Mahalanobis distance to
    their Gaussian at the same place.
    """

    def __init__(self, method: str, network: str, seed: int) -> None:
        """Choose the network.

        Args:
            method: "PatchCore" or "PaDiM".
            network: one of timm's, EfficientNet-lite0 where empty; `NAME@random` has random
                weights.
            seed: of random weights, of the coreset and of PaDiM's channels.

        Raises:
            BaselineError: there is no such network, or its weights cannot be had.
        """
        self.method, self.seed = method, seed
        self.network, _, self.weights = (network or LITE0).partition("@")
        self.name = " ".join((method, network or LITE0))
        try:
            self.model = self._built()
        except Exception as error:  # every hub has errors of its own
            raise BaselineError(
                f"no network {self.network!r} with weights: {first_line(error)}"
            ) from error

    def _built(self) -> PatchcoreModel | PadimModel:
        torch.manual_seed(self.seed)
        from_timm = self.weights != RANDOM and self.network != LITE0
        model = (
            PatchcoreModel(PATCHCORE_STAGES, self.network, from_timm)
            if self.method == "PatchCore"
            else PadimModel(self.network, list(PADIM_STAGES), from_timm, PADIM_CHANNELS)
        )
        if self.network == LITE0 and self.weights != RANDOM:
            load_lite0(model.feature_extractor.feature_extractor, lite0_weights())
        return model

    @torch.inference_mode()
    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Fit to the references.

        Raises:
            ReferencesError: there are none, or one for PaDiM.
        """
        least = 2 if self.method == "PaDiM" else 1
        if len(references) < least:
            raise ReferencesError(f"{self.method} needs --shots {least} or more")
        self.model = self._built().train()
        self.model.feature_extractor.eval()
        for sample in references:
            self.model(_pixels(sample))
        if isinstance(self.model, PadimModel):
            self.model.fit()
        else:
            patches = torch.vstack(self.model.embedding_store)
            if len(references) > CORESET_FROM:
                # Not anomalib's: it is not by seed, and leaves holes of 10 MB a step in the memory.
                draw = torch.Generator().manual_seed(self.seed)
                patches = patches[coreset([patches], int(CORESET * len(patches)), draw)]
            self.model.memory_bank = patches
        self.model.eval()

    @torch.inference_mode()
    def judge(self, sample: Sample) -> Judgement:
        """The model's score and map; the higher, the farther from the references."""
        output = self.model(_pixels(sample))
        anomaly_map = np.asarray(output.anomaly_map.squeeze().numpy(), np.float32)
        return Judgement(float(output.pred_score.squeeze()), None, anomaly_map)

    def close(self) -> None:
        """Nothing is held open."""


def _pixels(sample: Sample) -> Tensor:
    """A sample squashed to (1, 3, SIDE, SIDE), normalised as ImageNet's."""
    picture = torch.from_numpy(read_sample(sample).copy()).permute(2, 0, 1)[None]
    small = resize(picture, [SIDE, SIDE], InterpolationMode.BILINEAR).float() / 255
    return normalize(small, MEAN, STD)
