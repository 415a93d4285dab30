"""The anomaly expert against the outputs of the authors' published code."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from looktwice_adapters.checkpoint import ExpertFileError, load_expert
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig
from looktwice_adapters.towers import TowerConfig
from looktwice_adapters.train.expert import ExpertTraining, expert_loss, undecided
from looktwice_adapters.train.features import Shard
from tests.golden import GOLDEN, make_expert_checkpoint

CROPS = [3, 1]


@pytest.fixture(scope="module")
def released_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("expert") / "pretrained_expert_7b.pth"
    torch.save(make_expert_checkpoint.checkpoint(), path)
    return path


def test_expert_equals_published_code_on_every_output(released_file):
    expected = np.load(GOLDEN / "expert_outputs.npz")
    final, levels = make_expert_checkpoint.features(CROPS)

    output = load_expert(released_file)(levels, final, CROPS)

    for name, value in {
        "anomaly_map": output.significance,
        "crop_significance": output.crop_significance,
        "selected_tokens": output.selected,
        "global_token": output.global_token,
        "score": output.score,
    }.items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-5, err_msg=name)


def tiny_expert() -> AnomalyExpert:
    torch.manual_seed(0)
    return AnomalyExpert(
        ExpertConfig((6, 8), 8, embed_size=5, key_size=4, head_size=3, tower=TowerConfig(grid=3))
    )


def tiny_features() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(5, 9, size, generator=generator) for size in (6, 8)]
    return levels, torch.randn(5, 9, 8, generator=generator)


def test_the_map_is_the_mean_of_all_matchings():
    alone = tiny_expert()
    torch.manual_seed(2)
    three = AnomalyExpert(replace(alone.config, matchings=3))
    three.load_state_dict(alone.state_dict(), strict=False)
    features = *tiny_features(), [3, 2]
    maps = [matching.significance_map(*features) for matching in (alone, *three.others)]
    output = three(*features)
    torch.testing.assert_close(output.significance, torch.stack(maps).mean(0))
    assert not torch.allclose(output.significance, maps[0], atol=1e-3)
    assert not torch.equal(output.score, alone(*features).score)


def restated(expert, levels, final, crops):
    """The formulas of the paper once more, crop by crop, without a shared line of code.

    Scores, and the map of each image's crops.
    """
    parameters = dict(expert.named_parameters())

    def linear(x, name):
        return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    def mlp(x, name):
        hidden = linear(x, f"{name}.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        return linear(hidden, f"{name}.2")

    scores, shown, start = [], [], 0
    for count in crops:
        shown.append([])
        base = final[start]
        described = mlp(
            (base.T @ parameters["pooling_layer.0.weight"][0]) + parameters["pooling_layer.0.bias"],
            "class_predictor",
        )
        total, weights = 0, 0
        for crop in range(start, start + count):
            maps = []
            for i, level in enumerate(levels):
                tokens = linear(level[crop], f"siglip_adaptors.{i}")
                similar = []
                for side in ("positive_embedding", "negative_embedding"):
                    prompt = linear(
                        torch.cat((parameters[side][0], described)), f"prompt_adaptors.{i}"
                    )
                    similar.append(tokens @ prompt / tokens.norm(dim=-1) / prompt.norm())
                normal, abnormal = (torch.exp(100 * value) for value in similar)
                maps.append(abnormal / (normal + abnormal))
            significance = torch.stack(maps).mean(0).view(3, 3)
            shown[-1].append(significance)
            tokens = final[crop].view(3, 3, -1)
            for rows in (slice(0, 2), slice(1, 3)):
                for columns in (slice(0, 2), slice(1, 3)):
                    cell = significance[rows, columns]
                    query = (tokens[rows, columns] * cell[..., None]).mean((0, 1)) / cell.mean()
                    match = linear(final[crop], "q_former.key_proj") @ linear(
                        query, "q_former.query_proj"
                    )
                    attention = torch.softmax(match / 4**0.5, 0)
                    weight = cell.mean() * significance.mean()
                    total = total + weight * (attention @ final[crop])
                    weights = weights + weight
        scores.append(torch.sigmoid(mlp(total / weights, "final_predictor")))
        start += count
    return torch.cat(scores), [torch.stack(crops) for crops in shown]


def assert_same_gradients(expert, ours, theirs):
    gradients = [torch.autograd.grad(value, list(expert.parameters())) for value in (ours, theirs)]
    for (name, _), one, other in zip(expert.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-6, msg=lambda m, n=name: n + m)


def test_score_and_gradients_equal_a_plain_restatement_of_the_formulas():
    expert, (levels, final) = tiny_expert().double(), tiny_features()
    levels, final = [level.double() * 0.1 for level in levels], final.double()
    crops = [3, 2]

    score = expert(levels, final, crops).score
    expected, _ = restated(expert, levels, final, crops)

    torch.testing.assert_close(score, expected, atol=1e-12, rtol=1e-9)
    assert_same_gradients(expert, score.sum(), expected.sum())


def restated_loss(scores, maps, masks, labels):
    """Cross-entropy of score and peak, focal and dice loss of the map, the score's tie to it."""
    peaks = []
    for significance in maps:
        logits = (significance / (1 - significance)).log().flatten()
        count = max(1, len(logits) // 50)
        peaks.append(logits.sort(descending=True).values[:count].mean())
    peaks = torch.stack(peaks)
    followed = (scores / (1 - scores)).log()
    tie = ((followed - peaks.detach()) ** 2).mean()
    by_score, by_peak = (
        -(labels * value.log() + (1 - labels) * (1 - value).log()).mean()
        for value in (scores, torch.sigmoid(peaks))
    )
    significance, truth = torch.cat(maps)[:4], (masks[:4] > 0.25).double()  # the last has no mask
    given = torch.where(truth > 0, significance, 1 - significance)
    smooth, most = torch.tensor([1e-5, 1 - 1e-5]).double()  # as published, in float32
    given = given * most + (1 - given) * smooth + 1e-5
    focal = -((1 - given) ** 2 * given.log()).mean()
    both = 2 * (significance * truth).sum() + 1
    dice = 1 - both / (significance.sum() + truth.sum() + 1)
    return by_score + 0.5 * by_peak + 0.05 * tie + 10 * focal + dice


class SeenAsKept:
    """A tower whose tokens are what the batch keeps."""

    def tokens(self, kept):
        *levels, final = kept
        return levels, final


def test_the_training_loss_and_its_gradients_equal_a_plain_restatement():
    expert, (levels, final) = tiny_expert().double(), tiny_features()
    undecided(expert)  # as training begins: no probability is cut off at its edge
    expert.tower = SeenAsKept()
    levels, final = [level.double() * 0.1 for level in levels], final.double()
    masks = torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(2)).double()
    masks[4] = torch.nan
    batch = Shard([*levels, final], masks, [3, 2], torch.tensor([1, 0]))
    quiet = ExpertTraining(feature_noise=0, feature_dropout=0)

    loss = expert_loss(expert, batch, quiet, 0)
    scores, maps = restated(expert, levels, final, [3, 2])
    expected = restated_loss(scores, maps, masks, torch.tensor([1.0, 0.0]).double())

    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-9)
    assert_same_gradients(expert, loss, expected)


def test_an_image_is_judged_alone_whatever_shares_its_batch():
    expert, (levels, final) = tiny_expert(), tiny_features()
    together = expert(levels, final, [3, 2]).score
    alone = expert([level[3:] for level in levels], final[3:], [2]).score
    torch.testing.assert_close(together[1:], alone)


def test_file_with_a_missing_tensor_is_refused_by_its_name(tmp_path):
    state = make_expert_checkpoint.checkpoint()
    del state["final_predictor.2.bias"]
    torch.save(state, tmp_path / "expert.pth")
    with pytest.raises(ExpertFileError, match=r"final_predictor\.2\.bias is missing"):
        load_expert(tmp_path / "expert.pth")
