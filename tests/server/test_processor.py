"""Placeholders: as many as the embeddings that the model makes, for pictures of any size."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionConfig

from looktwice_adapters.prompt_learner import PromptLearner
from looktwice_adapters.shipped import CHECKOUT_MODELS
from looktwice_server.model import LookTwiceForConditionalGeneration
from looktwice_server.processor import (
    LookTwiceProcessingInfo,
    crop_grid,
    fitting_sizes,
    image_key,
)

LONGEST = 8100  # pixels; a 65-megapixel picture, beyond what a server takes


def hub_config() -> LlavaOnevisionConfig:
    """The geometry of the hub's checkpoints: 27 x 27 tokens a crop, 1 x 1 to 6 x 6 crops."""
    sides = range(384, 6 * 384 + 1, 384)
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
        vision_feature_select_strategy="full",
    )
    config.anomaly_expert = {"phrase_token_ids": [[4197, 0, 31327, 4419, 25, 220]] * 3}
    return config


@pytest.fixture(scope="module", params=["nano", "hub"])
def config(request) -> LlavaOnevisionConfig:
    if request.param == "hub":
        return hub_config()
    return LlavaOnevisionConfig.from_pretrained(CHECKOUT_MODELS / "nano")


def processing_info(config: LlavaOnevisionConfig) -> LookTwiceProcessingInfo:
    return LookTwiceProcessingInfo(SimpleNamespace(get_hf_config=lambda _type: config))


def placeholders(info: LookTwiceProcessingInfo, width: int, height: int) -> int:
    return info.get_num_image_tokens(image_width=width, image_height=height)


class Packer(LookTwiceForConditionalGeneration):
    """Our model without its networks: what remains is the packing of their tokens."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        torch.nn.Module.__init__(self)
        self.config = config
        self.image_newline = torch.zeros(1)
        self.multi_modal_projector = torch.nn.Identity()

    def _judge(self, cuts, references):
        counts = [len(cut.crops) for cut in cuts]
        tokens = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        output = SimpleNamespace(
            score=torch.zeros(len(counts)), significance=torch.zeros(sum(counts), 1, 1)
        )
        return torch.zeros(sum(counts), tokens, 1), output, [None] * len(counts)

    def _prompts(self, tokens, output, counts):
        phrase = torch.zeros(len(self.config.anomaly_expert["phrase_token_ids"][0]), 1)
        return [(phrase, torch.zeros(1), torch.zeros(count, 4, 1)) for count in counts]


class PromptedPacker(Packer):
    """The same with AnomalyGPT's prompt learner."""

    def __init__(self, config: LlavaOnevisionConfig) -> None:
        super().__init__(config)
        self.learner = PromptLearner(1, (1, 1, 1, 1, 1))

    def _prompts(self, tokens, output, counts):
        phrases = [prompt[0] for prompt in super()._prompts(tokens, output, counts)]
        return list(zip(phrases, self.learner(torch.zeros(len(counts), 2, 2)), strict=True))


def random_sizes(count: int) -> list[tuple[int, int]]:
    """Widths and heights from 1 to 8,100 px, half of them evenly, half by order of magnitude."""
    generator = np.random.default_rng(0)
    even = generator.integers(1, LONGEST + 1, (count // 2, 2))
    magnitudes = np.exp(generator.uniform(0, np.log(LONGEST), (count - count // 2, 2)))
    return [(int(w), int(h)) for w, h in np.concatenate((even, np.ceil(magnitudes)))]


@pytest.mark.parametrize("adapter", ["anomaly-ov", "anomalygpt"])
def test_placeholders_equal_embeddings_for_2000_random_sizes(config, adapter):
    packer = Packer(config)
    if adapter == "anomalygpt":
        config = deepcopy(config)
        config.anomalygpt = {"weights": "decoder.safetensors"}
        packer = PromptedPacker(config)
    info = processing_info(config)
    empty = torch.zeros(37, 0)  # more crops than any grid has, as where images are padded
    for width, height in random_sizes(2000):
        [image] = packer.encode([empty], [(height, width)])
        assert placeholders(info, width, height) == len(image.embeddings), (width, height)


def test_no_size_has_more_embeddings_than_the_room_that_vllm_reserves(config):
    info = processing_info(config)
    largest = info.get_image_size_with_most_features()
    limit = placeholders(info, *largest)
    for width, height in random_sizes(20_000):
        assert placeholders(info, width, height) <= limit, (width, height)


def test_every_length_of_a_random_size_is_that_of_a_fitting_size(config):
    info = processing_info(config)

    def shape(width: int, height: int) -> tuple[tuple[int, int], int]:
        return crop_grid(config, width=width, height=height), placeholders(info, width, height)

    known = {shape(*size) for size in fitting_sizes(config)}
    sides = config.vision_config.image_size
    # From half a crop a side: thinner pictures vanish when AnyRes scales them.
    sizes = [size for size in random_sizes(5000) if min(size) > sides // 2]
    assert {shape(*size) for size in sizes} <= known


def test_hub_checkpoints_need_room_for_8832_embeddings():
    info = processing_info(hub_config())
    assert placeholders(info, 1047, 1270) == 8832
    assert placeholders(info, *info.get_image_size_with_most_features()) == 8832


def test_images_that_differ_anywhere_in_their_identity_have_different_keys():
    hashes = ["ab" * 32, "ab" * 31 + "ac", "ab" * 32 + ".reference", "renderer0-mm-1-image-0"]
    keys = {image_key(mm_hash) for mm_hash in hashes}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {16}
