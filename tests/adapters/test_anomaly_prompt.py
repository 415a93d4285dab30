"""The order of an image's embeddings, and its adverb, against the published code."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionModel,
    get_anyres_image_grid_shape,
)

from looktwice_adapters.anomaly_prompt import (
    ADVERBS,
    adverb_index,
    append_prompt,
    phrase,
    prompt_length,
)
from tests.golden import GOLDEN

CASES = json.loads((GOLDEN / "layout.json").read_text())
CROP, PATCHES = 84, 36
CONFIG = SimpleNamespace(
    image_grid_pinpoints=[[CROP * i, CROP * j] for i in range(1, 4) for j in range(1, 4)],
    vision_config=SimpleNamespace(image_size=CROP, patch_size=14),
)
NEWLINE = torch.tensor([-1.0])
# Qwen2's tokens of the three phrases, and the codes that the cases give to texts.
PHRASES = torch.tensor([[4197, adverb, 31327, 4419, 25, 220] for adverb in (10078, 69251, 7548)])
BEFORE, END = [-1010.0, -1011.0], -1099.0  # before the first and second image, and at the end


def coded_image(index: int, first_crop: int, size: list[int], score: float) -> torch.Tensor:
    """One image of a case through our prompt and transformers' packing, each value its own code."""
    width, height = size
    grid = get_anyres_image_grid_shape((height, width), CONFIG.image_grid_pinpoints, CROP)
    crops = torch.arange(first_crop, first_crop + 1 + grid[0] * grid[1])
    patches = (PATCHES * crops[:, None] + torch.arange(PATCHES))[..., None].float()
    selected = (100_000 + 4 * crops[:, None] + torch.arange(4))[..., None].float()
    [packed], _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=CONFIG), [patches], torch.tensor([[height, width]]), NEWLINE
    )
    words = -1000 - PHRASES[adverb_index(torch.tensor(score))].float()
    global_token = torch.tensor([200_000.0 + index])
    return append_prompt(packed, words[:, None], global_token, selected, NEWLINE, grid)


@pytest.mark.parametrize("case", CASES, ids=[str(case["image_sizes_wh"]) for case in CASES])
def test_order_of_embeddings_equals_published_code(case):
    sequence, first_crop = [], 0
    for index, (size, score, grid) in enumerate(
        zip(case["image_sizes_wh"], case["scores"], case["grids_hw"], strict=True)
    ):
        image = coded_image(index, first_crop, size, score)
        sequence += [BEFORE[index], *image.squeeze(-1).tolist()]
        first_crop += 1 + grid[0] * grid[1]
    assert [*sequence, END] == case["sequence"]


@pytest.mark.parametrize(
    ("score", "adverb"),
    [
        (0.0, "slightly"),
        (0.29999, "slightly"),
        (0.3, "moderately"),  # float32(0.3) is above 0.3
        (0.69999, "moderately"),
        (0.7, "moderately"),  # float32(0.7) is below 0.7
        (0.70001, "highly"),
        (1.0, "highly"),
    ],
)
def test_adverb_is_that_of_a_float32_score_compared_with_a_double(score, adverb):
    assert ADVERBS[adverb_index(torch.tensor(score))] == adverb


def test_phrase_is_the_published_one():
    assert [phrase(adverb) for adverb in ADVERBS] == [
        " with slightly suspicious features: ",
        " with moderately suspicious features: ",
        " with highly suspicious features: ",
    ]


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (2, 3), (6, 6)])
def test_prompt_length_equals_the_number_of_embeddings_appended(grid):
    rows, columns = grid
    image, words = torch.zeros(5, 3), torch.ones(6, 3)
    selected = torch.zeros(1 + rows * columns, 4, 3)
    appended = append_prompt(image, words, torch.zeros(3), selected, torch.zeros(3), grid)
    assert len(appended) - len(image) == prompt_length(grid, len(words))
