"""Rounding errors stay rounding errors: what the expert sees hardly moves when its tower's do.

A convolution rounds differently with another number of threads, another batch or another machine.
A hard choice of the most similar tokens would turn that into another map.
"""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, LlavaOnevisionConfig

from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.shipped import CHECKOUT_MODELS
from looktwice_adapters.towers import rarity
from looktwice_server.model import exact_pixels
from tests.parity.pictures import draw

NANO = CHECKOUT_MODELS / "nano"
ROUNDING = 1e-6  # relative, of the tower's stages; measured between one thread and two
OWN = {"weights", "phrase_token_ids"}


def test_rounding_of_the_tower_moves_scores_and_maps_by_less_than_they_are_served_with():
    section = dict(LlavaOnevisionConfig.from_pretrained(NANO).anomaly_expert)
    config = ExpertConfig.from_dict({key: section[key] for key in section.keys() - OWN})
    expert = load_expert(NANO / "expert.safetensors", config)
    processor = AutoImageProcessor.from_pretrained(NANO)
    examples = [Image.open(path) for path in sorted((NANO.parents[1] / "examples").glob("*.png"))]
    pictures = [*examples, draw(217, 735, 4), draw(387, 69, 7), draw(264, 387, 3)]
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for picture in pictures:
        crops = processor(picture.convert("RGB"), return_tensors="pt").pixel_values[0]
        stages = expert.tower.stages(crops)
        rounded = [
            stage * (1 + ROUNDING * torch.randn(stage.shape, generator=generator))
            for stage in stages
        ]
        one, other = (
            expert(*expert.tower.tokens(each), [len(crops)]) for each in (stages, rounded)
        )
        assert (one.score - other.score).abs().item() < 1e-5
        assert (one.significance - other.significance).abs().max().item() < 1e-4
    torch.set_num_threads(threads)


def test_an_even_crop_has_the_same_rarity_whatever_it_is_rounded_to():
    generator = torch.Generator().manual_seed(0)
    even = torch.ones(1, 196, 40)
    rounded = even + 1e-6 * torch.randn(even.shape, generator=generator)
    for ours, theirs in zip(rarity(even, 5), rarity(rounded, 5), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_in_half_precision_are_restored_to_the_processors_own(dtype):
    processor = AutoImageProcessor.from_pretrained(NANO)
    crops = processor(draw(640, 480, 1), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(exact_pixels(crops.to(dtype)), crops, atol=2e-7, rtol=0)
    assert exact_pixels(crops) is crops
