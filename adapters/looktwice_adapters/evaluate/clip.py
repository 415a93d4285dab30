"""CLIP as a judge: a picture, or its windows, against prompts for normal and for damaged.

Prompts and the windows' harmonic aggregation are WinCLIP's (Jeong et al., CVPR 2023), as anomalib
has them; the model is any of open_clip's. Departs from WinCLIP: a window is a crop of the picture
that is encoded by itself, not a mask over the tokens, so that any image tower will do.
"""

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from anomalib.models.image.winclip.prompting import create_prompt_ensemble
from anomalib.models.image.winclip.utils import class_scores, harmonic_aggregation, make_masks
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from looktwice_adapters.datasets import Sample, read_sample
from looktwice_adapters.detector import Judgement
from looktwice_adapters.evaluate.baselines import RANDOM, BaselineError, first_line
from looktwice_adapters.facts import verdict_of

PAPERS_MODEL = "ViT-B-16-plus-240@laion400m_e31"  # WinCLIP's
GRID = 6  # cells a side
WINDOWS = (2, 3)  # cells a side of a window: a third and a half of the picture
BATCH = 32


class ClipJudge:
    """Zero-shot: softmax of a picture's similarity to normal and to damaged prompts."""

    def __init__(self, model: str, seed: int, *, windows: bool) -> None:
        """Load an open_clip model.

        Args:
            model: `NAME@WEIGHTS`, the weights being one of open_clip's tags, a file, or `random`.
            seed: of random weights.
            windows: also judge windows of the picture, and make a map of them (WinCLIP).

        Raises:
            BaselineError: there is no such model, or its weights cannot be had.
        """
        name, _, weights = (model or PAPERS_MODEL).partition("@")
        if name not in open_clip.list_models():
            raise BaselineError(f"open_clip knows no model {name!r}")
        torch.manual_seed(seed)
        tag = None if weights == RANDOM else weights
        if tag == "":
            raise BaselineError(f"say which weights: {name}@TAG, {name}@FILE or {name}@{RANDOM}")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                name, pretrained=tag
            )
        except Exception as error:  # every hub and file format has errors of its own
            raise BaselineError(
                f"no weights {weights!r} for {name}: {first_line(error)}"
            ) from error
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)
        self.windows = windows
        self.name = f"{'WinCLIP windows' if windows else 'CLIP prompts'} {name}@{weights}"
        self.prompts = torch.empty(0)

    @torch.inference_mode()
    def prepare(self, product: str, references: Sequence[Sample]) -> None:
        """Encode the product's prompts; references are not looked at."""
        words = product.rpartition("/")[2].replace("_", " ")
        rows = [
            normalize(self.model.encode_text(self.tokenizer(texts)), dim=-1).mean(0)
            for texts in create_prompt_ensemble(words)
        ]
        self.prompts = torch.stack(rows)  # (2, C): normal, damaged

    @torch.inference_mode()
    def judge(self, sample: Sample) -> Judgement:
        """How much more the picture looks like damaged than like normal prompts, in [0, 1]."""
        picture = read_sample(sample)
        score = float(self._scores([picture])[0])
        if not self.windows:
            return Judgement(score, verdict_of(score))
        return Judgement(score, verdict_of(score), self._window_map(picture, score))

    def _scores(self, pictures: list[NDArray[np.uint8]]) -> Tensor:
        """Probability (B,) of damaged."""
        temperature = 1 / float(self.model.logit_scale.exp())
        found = []
        for start in range(0, len(pictures), BATCH):
            batch = [
                self.preprocess(Image.fromarray(part)) for part in pictures[start : start + BATCH]
            ]
            tokens = self.model.encode_image(torch.stack(batch))
            found.append(class_scores(tokens, self.prompts, temperature, target_class=1))
        return torch.cat(found)

    def _window_map(self, picture: NDArray[np.uint8], whole: float) -> NDArray[np.float32]:
        """Harmonic mean over the window sizes and the whole picture: (GRID, GRID)."""
        rows = np.linspace(0, picture.shape[0], GRID + 1).round().astype(int)
        columns = np.linspace(0, picture.shape[1], GRID + 1).round().astype(int)
        maps = [torch.full((1, GRID, GRID), whole)]
        for cells in WINDOWS:
            masks = make_masks((GRID, GRID), cells)  # (cells * cells, windows) indices of cells
            parts = []
            for window in masks.T:
                row, column = divmod(int(window[0]), GRID)
                top, bottom = rows[row], max(rows[row + cells], rows[row] + 1)
                left, right = columns[column], max(columns[column + cells], columns[column] + 1)
                parts.append(picture[top:bottom, left:right])
            scores = self._scores(parts)[None]
            maps.append(harmonic_aggregation(scores, (GRID, GRID), masks))
        mean = len(maps) / (1 / torch.cat(maps)).sum(0)
        return np.asarray(mean.numpy(), np.float32)

    def close(self) -> None:
        """Nothing is held open."""
