"""The memory bank: the published few-shot map, the search within its memory, the coreset."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, normalize

from looktwice_adapters import memory_bank
from looktwice_adapters.memory_bank import (
    CANDIDATES,
    MemoryBank,
    ReferenceTokens,
    best_similarity,
    coreset,
    k_centres,
)
from tests.golden import GOLDEN


def tokens(images: int, seed: int = 0, *, crops: int = 2, patches: int = 16) -> list[list]:
    """Of each image two levels of drawn tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(crops, patches, channels, generator=draw) for channels in (8, 12)]
        for _ in range(images)
    ]


def test_few_shot_map_equals_the_published_one():
    golden = np.load(GOLDEN / "anomalygpt_outputs.npz")
    query, normal = (list(torch.from_numpy(golden[name])) for name in ("query", "normal"))
    bank = MemoryBank.of([normal])
    distance = bank.distances(query).view(1, 1, 16, 16)
    whole = interpolate(distance, 224, mode="bilinear", align_corners=True)[0, 0]
    assert np.abs(whole[::4, ::4].numpy() - golden["few_shot_map"]).max() < 1e-6


def test_a_reference_image_is_at_no_distance_from_itself_and_without_itself_it_is():
    images = tokens(3)
    known = ReferenceTokens.of(images)
    assert known.bank().distances(images[1]).abs().max() < 1e-6
    assert known.bank(1).distances(images[1]).min() > 0.01


def test_a_bank_without_an_image_is_the_bank_of_the_others():
    images = tokens(3)
    alone, others = ReferenceTokens.of(images).bank(1), MemoryBank.of([images[0], images[2]])
    assert all(map(torch.equal, alone.levels, others.levels))


def test_more_references_never_bring_a_picture_farther_away():
    images = tokens(4)
    query = tokens(1, seed=9)[0]
    near = MemoryBank.of(images).distances(query)
    far = MemoryBank.of(images[:2]).distances(query)
    assert (near <= far + 1e-6).all()


@pytest.mark.parametrize("budget", [1, 10_000, 2**30])
def test_the_result_does_not_depend_on_the_memory_budget(budget):
    draw = torch.Generator().manual_seed(1)
    query = normalize(torch.randn(1500, 8, generator=draw), dim=-1)
    bank = normalize(torch.randn(300, 8, generator=draw), dim=-1)
    whole = (query @ bank.T).amax(1)
    assert (best_similarity(query, bank, budget) - whole).abs().max() < 1e-6


def test_a_large_bank_is_searched_within_the_budget(monkeypatch):
    """Blocks of similarities and of converted tokens stay within the bytes that were given."""
    largest = []
    real = torch.Tensor.__matmul__

    def watched(left, right):
        product = real(left, right)
        largest.append(4 * (product.numel() + right.numel()))
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    query = torch.randn(980, 64)
    bank = torch.randn(100_000, 64).half()
    budget = 4 * 2**20
    best_similarity(query, bank, budget)
    assert max(largest) <= budget
    assert len(largest) > 50


def test_k_centres_are_the_farthest_points_in_turn():
    points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [10.0, 0.0], [0.0, 7.0], [0.2, 0.1]])
    assert set(k_centres(points, 3)[1:].tolist()) == {2, 3}


def test_a_coreset_keeps_the_size_and_every_kind_of_token():
    draw = torch.Generator().manual_seed(0)
    common = torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(1, 990, 4, generator=draw)
    rare = torch.tensor([0, 1.0, 0, 0]) + 0.01 * torch.randn(1, 10, 4, generator=draw)
    image = [torch.cat((common, rare), 1)]
    small = MemoryBank.of([image], size=250)
    assert len(small) == 250
    assert small.distances([torch.tensor([[[0, 1.0, 0, 0]]])]).item() < 0.01
    assert len(MemoryBank.of([image], size=5000)) == 1000
    again = MemoryBank.of([image], size=250)
    assert torch.equal(small.levels[0], again.levels[0])


def test_a_thinned_banks_tokens_are_the_means_of_those_nearest_to_the_centres():
    [image] = tokens(1, crops=1, patches=40)
    known = ReferenceTokens.of([image], size=8)
    centres = coreset(known.levels, 8, torch.Generator().manual_seed(0))
    both = torch.cat(known.levels, dim=1)
    assert torch.equal(known.clusters, (both @ both[centres].T).argmax(1))
    for level, made in zip(known.levels, known.bank().levels, strict=True):
        for cluster, token in enumerate(made):
            mean = normalize(level[known.clusters == cluster].mean(0), dim=0)
            assert (mean - token).abs().max() < 1e-6


def test_nothing_of_an_image_that_is_left_out_stays_in_a_thinned_bank():
    images = tokens(3)
    known = ReferenceTokens.of(images, size=20)
    changed = [part + 1 for part in known.levels]
    mine = known.owners == 1
    other = [torch.where(mine[:, None], *pair) for pair in zip(changed, known.levels, strict=True)]
    without = known.bank(1)
    assert all(map(torch.equal, without.levels, replace(known, levels=tuple(other)).bank(1).levels))
    assert len(without) <= 20
    assert not all(map(torch.equal, without.levels, known.bank().levels))


def test_only_the_tokens_that_a_coreset_chooses_from_are_converted(monkeypatch):
    """A hub-size tower's tokens of many pictures, all in float32, would not fit."""
    converted = []
    real = memory_bank.normalize

    def watched(level, dim):
        converted.append(len(level))
        return real(level, dim=dim)

    monkeypatch.setattr(memory_bank, "normalize", watched)
    images = [[level.half() for level in image] for image in tokens(40)]  # of 32 tokens
    known = ReferenceTokens.of(images, size=10)
    assert converted == [10 * CANDIDATES] * 2
    assert len(known.bank()) == 10
    for row, owner in enumerate(known.owners):  # and a token is still its image's
        own = normalize(images[owner][1].flatten(0, 1).float(), dim=-1)
        assert (own == known.levels[1][row]).all(1).any()


def test_copies_leave_with_their_image():
    images = tokens(4)
    bank = ReferenceTokens.of(images, [0, 0, 1, 1]).bank(0)
    assert all(map(torch.equal, bank.levels, MemoryBank.of(images[2:]).levels))
