"""vLLM's multi-modal processor: pictures of a prompt -> crops, placeholder lengths and record keys.

Two things are added to vLLM's own for LLaVA-OneVision: an image's placeholder is longer by the
anomaly prompt, and each image carries the key under which the worker keeps what it encoded.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)
from vllm.inputs import MultiModalHashes
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing.inputs import ProcessorInputs

from looktwice_adapters.anomaly_prompt import prompt_length
from looktwice_adapters.prompt_learner import PROMPTS
from looktwice_server.weights import decoder_file

IMAGE_KEY = "image_key"
KEY_BYTES = 16
VERSION_KEY = "reference_version"
VERSION_BYTES = 8


def crop_grid(hf_config: Any, *, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the crops that AnyRes makes of a picture."""
    rows, columns = get_anyres_image_grid_shape(
        (height, width), hf_config.image_grid_pinpoints, hf_config.vision_config.image_size
    )
    return int(rows), int(columns)


def fitting_sizes(hf_config: Any) -> set[ImageSize]:
    """A size of every length that a picture's tokens can have: each token count on each grid.

    A picture fills its grid along one side; along the other, where padding is cut off again, it
    ends somewhere in the last crop (it would get a smaller grid else). The size in pixels beyond
    that changes nothing.
    """
    crop = hf_config.vision_config.image_size
    tokens = crop // hf_config.vision_config.patch_size  # of a crop's side
    ends = {max(1, math.ceil(count * crop / tokens)) for count in range(tokens + 1)}
    return {
        size
        for height, width in hf_config.image_grid_pinpoints
        for end in ends
        for size in (
            ImageSize(width=width, height=height - crop + end),
            ImageSize(width=width - crop + end, height=height),
        )
    }


def image_key(mm_hash: str) -> bytes:
    """The key under which the worker keeps what it encoded of an image (16 bytes)."""
    return blake2b(mm_hash.encode(), digest_size=KEY_BYTES).digest()


def against(mm_hash: str, version: str) -> str:
    """The identity of an image that is compared with a version of a reference.

    All caches are keyed by it: what was made against one version is never taken for another's.
    """
    return f"{mm_hash}.{version}"


def version_in(data: Tensor) -> str | None:
    """The reference's version that an image carries; None where it is compared with none."""
    version = bytes(data.tolist()).hex()
    return version if version.strip("0") else None


def set_identity(item: MultiModalKwargsItem, mm_hash: str, version: str | None = None) -> None:
    """Put an image's key, and the version that it is compared with, beside its crops."""
    field = MultiModalBatchedField(keep_on_cpu=True)
    compared = bytes.fromhex(version or "00" * VERSION_BYTES)
    # vLLM hands over tensors only.
    for name, data in ((IMAGE_KEY, image_key(mm_hash)), (VERSION_KEY, compared)):
        value = torch.tensor(list(data), dtype=torch.uint8)
        item[name] = MultiModalFieldElem(data=value, field=field)


class LookTwiceProcessingInfo(LlavaOnevisionProcessingInfo):
    """Sizes of the placeholders."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Pictures only: the expert has no notion of a video."""
        return {"image": None}

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Embeddings of one image: AnyRes features, then the prompt of whoever judges."""
        hf_config = self.get_hf_config()
        grid = crop_grid(hf_config, width=image_width, height=image_height)
        phrase_tokens = len(hf_config.anomaly_expert["phrase_token_ids"][0])
        features = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        if decoder_file(hf_config) is not None:
            return features + phrase_tokens + PROMPTS
        return features + prompt_length(grid, phrase_tokens)

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size that vLLM reserves room for: no other has more embeddings.

        The stock model names one size, which is not the worst for every grid of crops.
        """
        return self._largest

    @cached_property
    def _largest(self) -> ImageSize:
        return max(
            fitting_sizes(self.get_hf_config()),
            key=lambda size: self.get_num_image_tokens(
                image_width=size.width, image_height=size.height
            ),
        )


class LookTwiceMultiModalProcessor(LlavaOnevisionMultiModalProcessor):
    """Adds each image's key to what the model gets."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        key = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, IMAGE_KEY: key, VERSION_KEY: key}

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> MultiModalHashes:
        """An image's identity is its content, whatever caches vLLM is run with.

        Without them vLLM numbers the images, and what was found on one would never be found again.
        """
        return super()._get_mm_hashes(replace(inputs, mm_uuid_items=None))

    def _apply_hf_processor(self, inputs, timing_ctx):  # type: ignore[no-untyped-def]
        result = super()._apply_hf_processor(inputs, timing_ctx)
        _add_keys(result.kwargs, result.hashes.get("image", []))
        return result


def _add_keys(kwargs: MultiModalKwargsItems, mm_hashes: list[str]) -> None:
    """Put the key beside each image's crops."""
    for item, mm_hash in zip(kwargs.get("image", ()), mm_hashes, strict=True):
        if item is not None:
            set_identity(item, mm_hash)
