"""The served model: LLaVA-OneVision whose images carry Anomaly-OV's or AnomalyGPT's prompt.

Crops go through the image tower and the anomaly expert, or through the expert's tower and
AnomalyGPT's decoder; out come an image's embeddings in the published order, and the record (score,
significance map) that the API side turns into an inspection.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.multimodal import MULTIMODAL_REGISTRY

from looktwice_adapters.anomaly_prompt import adverb_index, append_prompt
from looktwice_adapters.anomalygpt import PREFIX, AnomalyGPT, DecoderOutput
from looktwice_adapters.checkpoint import read_expert
from looktwice_adapters.expert import AnomalyExpert, ExpertOutput
from looktwice_adapters.few_shot import FewShotJudgement, Looked, Reference, look
from looktwice_adapters.recut import Cut
from looktwice_server.processor import (
    IMAGE_KEY,
    VERSION_KEY,
    LookTwiceMultiModalProcessor,
    LookTwiceProcessingInfo,
    crop_grid,
    version_in,
)
from looktwice_server.reference_store import LoadedReferences, ReferenceStore
from looktwice_server.settings import served
from looktwice_server.weights import ExpertSection, decoder_file

# Phrase, then global token and selected tokens (Anomaly-OV), or prompt embeddings (AnomalyGPT).
Prompt = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor]

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """One image, encoded."""

    embeddings: Tensor  # (T, D): AnyRes features and anomaly prompt
    score: float  # calibrated, in [0, 1]; against a reference that of both
    significance: Tensor  # (B, h, w) float32, the crops' maps, calibrated against a reference
    judgement: FewShotJudgement | None  # against a reference


def exact_pixels(pixels: Tensor) -> Tensor:
    """Crops (B, 3, S, S) in float32 as they were before vLLM rounded them to half precision.

    The processor resizes in 8 bits and normalises to (x / 255 - 0.5) / 0.5; half precision still
    tells the 256 levels apart.
    """
    if pixels.dtype == torch.float32:
        return pixels
    levels = ((pixels.float() / 2 + 0.5) * 255).round()
    return (levels / 255 - 0.5) / 0.5


class EmbeddingCache:
    """The latest images' embeddings, up to a number of bytes: inspected now, talked about next."""

    def __init__(self, capacity: int) -> None:
        """Keep at most `capacity` bytes."""
        self._capacity = capacity
        self._size = 0
        self._items: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        """The embeddings under the key, if they are still there."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, embeddings: Tensor) -> None:
        """Keep the embeddings and drop the oldest ones beyond the capacity."""
        if (old := self._items.pop(key, None)) is not None:
            self._size -= old.nbytes
        self._items[key] = embeddings
        self._size += embeddings.nbytes
        while self._size > self._capacity:
            self._size -= self._items.popitem(last=False)[1].nbytes


@MULTIMODAL_REGISTRY.register_processor(
    LookTwiceMultiModalProcessor,
    info=LookTwiceProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class LookTwiceForConditionalGeneration(LlavaOnevisionForConditionalGeneration, SupportsLoRA):
    """vLLM's LLaVA-OneVision with the anomaly expert in it; LoRA adapts its language model."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the stock model, then expert and decoder, always in float32."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.section = ExpertSection.from_config(self.config)
        self.anomaly_expert = AnomalyExpert(self.section.config).float()
        decoder = decoder_file(self.config)
        self.anomalygpt = None if decoder is None else AnomalyGPT.load(decoder)
        self.register_buffer(
            "phrase_token_ids", torch.tensor(self.section.phrase_token_ids), persistent=False
        )
        settings = served()
        self.cache = EmbeddingCache(settings.embeddings_cached_mb * 2**20)
        self.references = LoadedReferences(
            ReferenceStore(settings.references, settings.max_references),
            vllm_config.device_config.device,
            settings.references_cached_mb * 2**20,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint, then the expert's own file."""
        state = read_expert(self.section.weights)
        # vLLM reads every .safetensors of the folder: ours that lie there are passed over.
        loaded = super().load_weights(
            (name, value)
            for name, value in weights
            if name not in state and not name.startswith(PREFIX)
        )
        self.anomaly_expert.load(state)
        own = ("anomaly_expert.", PREFIX)
        return loaded | {name for name in self.state_dict() if name.startswith(own)}

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are which, for vLLM's LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector="multi_modal_projector",
            tower_model="vision_tower",
        )

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Each image's embeddings (T, D); those just inspected are not encoded again."""
        inputs = self._parse_and_validate_image_input(**kwargs)
        if inputs is None:
            return []
        keys = [bytes(key.tolist()) for key in kwargs[IMAGE_KEY]]
        found = {i: kept for i, key in enumerate(keys) if (kept := self.cache.get(key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        encoded = self.encode(
            [inputs["pixel_values"][i] for i in missing],
            [inputs["image_sizes"][i].tolist() for i in missing],
            [self._known_reference(version_in(kwargs[VERSION_KEY][i])) for i in missing],
        )
        found |= {i: image.embeddings for i, image in zip(missing, encoded, strict=True)}
        return [found[i] for i in range(len(keys))]

    def _known_reference(self, version: str | None) -> Reference | None:
        """The reference of a version; None where it cannot be had any more, which is logged."""
        if version is None:
            return None
        try:
            return self.references.get(version)
        except Exception:
            # Its inspection is long answered; only its evicted embeddings are made again.
            logger.exception("reference version %s is gone; encoding without it", version)
            return None

    def inspect(self, key: bytes, image: Encoded) -> dict[str, Any]:
        """The record of an encoded image for the API side; its embeddings are kept for the chat."""
        self.cache.put(key, image.embeddings)
        significance = image.significance.cpu()
        return {
            "score": image.score,
            "shape": list(significance.shape),
            "significance": significance.numpy().tobytes(),
            "p_value": None if image.judgement is None else image.judgement.p_value,
            "verdict": None if image.judgement is None else image.judgement.verdict,
        }

    def cut(self, pixels: Tensor, size: Sequence[int]) -> Cut:
        """An image of `size` (height, width) by its crops (B, 3, S, S)."""
        height, width = size
        grid = crop_grid(self.config, width=width, height=height)
        # Images of unequal size are padded with empty crops, which the score would see.
        return Cut(pixels[: 1 + grid[0] * grid[1]], (width, height), grid)

    @torch.inference_mode()
    def look(self, pixels: Tensor) -> Looked:
        """What few-shot detection needs of one image's crops (B, 3, S, S)."""
        levels, final, _ = self._features(pixels, [len(pixels)])
        significance = self.judging.significance_map(levels, final, [len(pixels)])
        return look(self.anomaly_expert, levels, significance, self.judging.config.calibration)

    @torch.inference_mode()
    def encode(
        self,
        pixel_values: Sequence[Tensor],
        image_sizes: Sequence[Sequence[int]],
        references: Sequence[Reference | None] = (),
    ) -> list[Encoded]:
        """Look at some images, once.

        Args:
            pixel_values: of each image (B, 3, S, S), the base view first.
            image_sizes: (height, width) of each image before AnyRes.
            references: what each image is compared with, if any is with anything.
        """
        if not pixel_values:
            return []
        cuts = [self.cut(*pair) for pair in zip(pixel_values, image_sizes, strict=True)]
        counts = [len(cut.crops) for cut in cuts]
        tokens, output, judgements = self._judge(cuts, references)
        features = self.multi_modal_projector(tokens).split(counts)
        prompts = self._prompts(tokens, output, counts)
        scores = output.score.tolist()
        significance = output.significance.split(counts)
        return [
            Encoded(
                self._append(
                    self._merge_image_patch_embeddings(
                        torch.tensor(image_sizes[i]),
                        features[i],
                        image_newline=self.image_newline,
                        strategy="spatial_unpad",
                    ),
                    prompts[i],
                    cuts[i].grid,
                ),
                scores[i],
                significance[i],
                judgements[i],
            )
            for i in range(len(cuts))
        ]

    @property
    def judging(self) -> AnomalyExpert | AnomalyGPT:
        """What makes map and score of the expert tower's tokens."""
        return self.anomaly_expert if self.anomalygpt is None else self.anomalygpt

    def _judge(
        self, cuts: list[Cut], references: Sequence[Reference | None]
    ) -> tuple[Tensor, ExpertOutput | DecoderOutput, list[FewShotJudgement | None]]:
        """The LLM tower's final tokens (B, N, C) and what judge and references say of the crops.

        Scores are calibrated, so that the adverb says what the score on the wire says. Against a
        reference the fused map makes the prompt and the fused score is the score, so that the
        language model sees what the references say.
        """
        counts = [len(cut.crops) for cut in cuts]
        levels, final, tokens = self._features(torch.cat([cut.crops for cut in cuts]), counts)
        expert, calibration = self.anomaly_expert, self.judging.config.calibration
        significance = self.judging.significance_map(levels, final, counts)
        maps = list(significance.split(counts))
        judgements: list[FewShotJudgement | None] = [None] * len(counts)
        split = list(zip(*(level.split(counts) for level in levels), strict=True))
        for i, reference in enumerate(references):
            if reference is not None:
                if reference.grid in (None, cuts[i].grid):
                    seen = look(expert, list(split[i]), maps[i], calibration)
                else:
                    seen = self.look(cuts[i].on(reference.grid))
                judged = reference.judge(seen)
                maps[i] = cuts[i].back(judged.anomaly_map, reference.grid)
                judgements[i] = judged
        output = self.judging.look_again(final, torch.cat(maps), counts)
        scores = [
            calibration.score(raw, crops) if judged is None else raw.new_tensor(judged.score)
            for raw, crops, judged in zip(output.score.double(), maps, judgements, strict=True)
        ]
        return tokens, output._replace(score=torch.stack(scores)), judgements

    def _features(self, pixels: Tensor, counts: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """The expert's levels and final tokens, float32, and the LLM tower's final tokens."""
        pixels = pixels.to(self.image_newline.dtype)
        tower = self.section.config.tower
        if tower.name != "llm":
            tokens = self._image_pixels_to_features(self.vision_tower, pixels)
            return *self._own_features(pixels, counts), tokens
        layers = [*tower.levels, tower.final]
        stacked = self.vision_tower(pixels, select_layers=layers, feature_select_strategy="full")
        *levels, tokens = stacked.chunk(len(layers), dim=-1)
        return [level.float() for level in levels], tokens.float(), tokens

    def _own_features(self, pixels: Tensor, counts: list[int]) -> tuple[list[Tensor], Tensor]:
        """Levels and final tokens of the expert's own tower."""
        # Image by image: a convolution rounds differently in another batch, and a picture's score
        # must not depend on whose pictures are inspected beside it.
        looks = [self.anomaly_expert.tower(crops) for crops in exact_pixels(pixels).split(counts)]
        levels = [torch.cat(level) for level in zip(*(look[0] for look in looks), strict=True)]
        return levels, torch.cat([look[1] for look in looks])

    def _prompts(
        self, tokens: Tensor, output: ExpertOutput | DecoderOutput, counts: list[int]
    ) -> list[Prompt]:
        """What stands behind each image, as the LLM takes it."""
        phrase_ids = self.phrase_token_ids[adverb_index(output.score)]
        phrases = self.language_model.embed_input_ids(phrase_ids)
        if isinstance(output, DecoderOutput):
            return list(zip(phrases, output.prompts.to(phrases.dtype), strict=True))
        selected, global_tokens = self.anomaly_expert.suspicious_tokens(
            output, tokens.float(), counts
        )
        project = self.multi_modal_projector
        return list(
            zip(
                phrases,
                project(global_tokens.to(tokens.dtype)),
                project(selected.to(tokens.dtype)).split(counts),
                strict=True,
            )
        )

    def _append(self, image_tokens: Tensor, prompt: Prompt, grid: tuple[int, int]) -> Tensor:
        """One image's embeddings (T, D): its AnyRes features, then what stands behind them."""
        if len(prompt) == 2:
            return torch.cat((image_tokens, *prompt))
        return append_prompt(image_tokens, *prompt, self.image_newline, grid)
