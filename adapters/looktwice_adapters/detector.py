"""A checkpoint folder's anomaly expert, in process: a picture -> calibrated score and anomaly map.

The same crops, expert, stitching and calibration as the server's, without a language model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from looktwice_adapters.anomaly_map import stitch
from looktwice_adapters.anomalygpt import AnomalyGPT
from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.datasets import AnyRes
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig
from looktwice_adapters.facts import Verdict, verdict_of
from looktwice_adapters.few_shot import Looked, Reference, common_grid, look
from looktwice_adapters.llm_tower import LlmTower
from looktwice_adapters.recut import Cut, Grid
from looktwice_adapters.shipped import shipped_folder

NOT_THE_EXPERTS = ("weights", "phrase_token_ids")  # of the section: the server's


def shipped_checkpoint() -> Path:
    """Nano's folder, where `looktwice serve` finds it too.

    Raises:
        CheckpointError: nowhere.
    """
    folder = shipped_folder("nano")
    if folder is None:
        raise CheckpointError(
            "nano is neither under $LOOKTWICE_MODELS nor in a checkout's models: name a folder"
        )
    return folder


def expert_file(folder: Path) -> Path:
    """The weights of a checkpoint folder's expert."""
    section = json.loads((folder / "config.json").read_text())["anomaly_expert"]
    return folder / section["weights"]


class CheckpointError(ValueError):
    """The folder holds no checkpoint with an expert."""


@dataclass(frozen=True)
class Judgement:
    """What is said of one picture."""

    score: float  # higher is more anomalous; in [0, 1] where there is a verdict
    verdict: Verdict | None = None  # None: who judged has no threshold
    anomaly_map: NDArray[np.float32] | None = None  # (h, w) at any size, in the picture's aspect


@dataclass(frozen=True)
class Detector:
    """An expert, how its pictures are cut, and who judges by its tower's tokens."""

    expert: AnomalyExpert
    anyres: AnyRes
    decoder: AnomalyGPT | None = None  # judges in the expert's place

    @classmethod
    def from_folder(cls, folder: Path, decoder: Path | None = None) -> "Detector":
        """Load the expert of a checkpoint folder, and a decoder that `train decoder` wrote for it.

        Raises:
            CheckpointError: no config.json with an `anomaly_expert`, or it is no JSON.
            ExpertFileError: its weights do not fit.
            DecoderFileError: the decoder's do not.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no config.json")
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path} is no JSON: {error}") from error
        section = config.get("anomaly_expert") if isinstance(config, dict) else None
        if section is None:
            raise CheckpointError(f"{path} has no section anomaly_expert")
        sizes = {name: value for name, value in section.items() if name not in NOT_THE_EXPERTS}
        expert_config = ExpertConfig.from_dict(sizes)
        expert = load_expert(expert_file(folder), expert_config)
        if expert_config.tower.name == "llm":
            expert.tower = LlmTower.from_checkpoint(folder, expert_config.tower)
        anyres = AnyRes.of_checkpoint(folder)
        if decoder is None:
            return cls(expert, anyres)
        parts = AnomalyGPT.load(decoder)
        parts.config.check(expert_file(folder), config["text_config"]["hidden_size"])
        return cls(expert, anyres, parts)

    @property
    def judging(self) -> AnomalyExpert | AnomalyGPT:
        """What makes map and score of the tower's tokens."""
        return self.expert if self.decoder is None else self.decoder

    def cut(self, picture: NDArray[np.uint8]) -> Cut:
        """A picture (H, W, 3) as AnyRes cuts it."""
        height, width = picture.shape[:2]
        crops = (self.anyres.crops(picture).float() / 255 - 0.5) / 0.5
        return Cut(crops, (width, height), self.grid((height, width)))

    def grid(self, size: tuple[int, int]) -> Grid:
        """The grid of crops of a picture of `size` (height, width)."""
        height, width = self.anyres.canvas(size)
        return height // self.anyres.side, width // self.anyres.side

    def tokens(self, picture: NDArray[np.uint8]) -> tuple[list[Tensor], Tensor]:
        """The expert's levels L x (B, N, C_l) and final tokens (B, N, C) of a picture (H, W, 3)."""
        levels, final = self.expert.tower(self.cut(picture).crops)
        return levels, final

    def stitched(self, significance: Tensor, picture: NDArray[np.uint8]) -> Tensor:
        """The map (H, W) of a picture (H, W, 3) from that of its crops (B, h, w)."""
        height, width = picture.shape[:2]
        grid = self.grid((height, width))
        return stitch(significance, grid, (width, height), self.anyres.side)

    @torch.inference_mode()
    def raw(self, picture: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor]:
        """Of a picture (H, W, 3): raw score (), crops' significance (B, h, w), stitched (H, W)."""
        levels, final = self.tokens(picture)
        output = self.judging(levels, final, [len(final)])
        return output.score[0], output.significance, self.stitched(output.significance, picture)

    @torch.inference_mode()
    def look(self, picture: NDArray[np.uint8], grid: Grid | None = None) -> Looked:
        """What few-shot detection needs of a picture (H, W, 3), cut on its own grid or another."""
        return self._look(self.cut(picture).on(grid))

    def _look(self, crops: Tensor) -> Looked:
        levels, final = self.expert.tower(crops)
        significance = self.judging.significance_map(levels, final, [len(final)])
        return look(self.expert, levels, significance, self.judging.config.calibration)

    def look_alike(self, pictures: Sequence[NDArray[np.uint8]]) -> tuple[list[Looked], Grid]:
        """A reference's pictures (H, W, 3), all cut on the grid that most of them have."""
        grid = common_grid([self.grid((one.shape[0], one.shape[1])) for one in pictures])
        return [self.look(picture, grid) for picture in pictures], grid

    @torch.inference_mode()
    def judge(self, picture: NDArray[np.uint8], reference: Reference | None = None) -> Judgement:
        """Calibrated score and anomaly map of a picture (H, W, 3), against a reference if any."""
        if reference is not None:
            cut = self.cut(picture)
            judged = reference.judge(self._look(cut.on(reference.grid)))
            fused_map = cut.back(judged.anomaly_map, reference.grid)
            fused = self.stitched(fused_map, picture).numpy()
            return Judgement(judged.score, judged.verdict, fused)
        raw, significance, whole = self.raw(picture)
        calibration = self.judging.config.calibration
        calibrated = calibration.map(whole).numpy().astype(np.float32)
        score = float(calibration.score(raw.double(), significance))
        return Judgement(score, verdict_of(score), calibrated)
