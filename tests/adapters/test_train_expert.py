import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from looktwice_adapters.calibration import calibrate
from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.datasets import AnyRes
from looktwice_adapters.detector import Detector
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.towers import TimmTower, TowerConfig, fold, lite0_weights, rarity
from looktwice_adapters.train.expert import (
    ExpertTraining,
    batch_at,
    expert_loss,
    map_losses,
    new_expert,
    save_expert,
    train_expert,
)
from looktwice_adapters.train.features import (
    TOWER,
    ShardPlan,
    frozen_tower,
    make_shard,
    read_shard,
)
from looktwice_adapters.train.run import Schedule

LITE0_MEANS = [4.8701735, 2.6612977, 1.1307336]
TRAINING = ExpertTraining(pairs=2, embed_size=16)


def schedule(steps):
    return Schedule(steps, 1e-3, warmup=2, save_every=3, log_every=1)


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def weights():
    return lite0_weights()


@pytest.fixture(scope="module")
def shards(weights, tmp_path_factory):
    plan = ShardPlan(
        tmp_path_factory.mktemp("features"), weights, kinds=("lesion", "dead_area"), pairs=3
    )
    return [read_shard(make_shard(plan, number)) for number in range(2)]


def test_the_tower_is_the_imagenet_network(weights):
    # A ramp, by the package's own network (efficientnet-lite-pytorch 0.1.0), blocks 4, 10 and 15.
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    tower = frozen_tower(weights)
    with torch.no_grad():
        stages = tower.network(ramp)
    assert [tuple(s.shape[1:]) for s in stages] == [(40, 28, 28), (112, 14, 14), (320, 7, 7)]
    means = [stage.abs().mean().item() for stage in stages]
    assert means == pytest.approx(LITE0_MEANS, rel=1e-4)


def test_folded_batch_norms_change_nothing_but_rounding(weights):
    tower, folded = frozen_tower(weights), copy.deepcopy(frozen_tower(weights))
    torch.set_default_dtype(torch.bfloat16)  # as vLLM has it while weights load
    try:
        fold(folded.network)
    finally:
        torch.set_default_dtype(torch.float32)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not [m for m in folded.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for stage, same in zip(tower.stages(pixels), folded.stages(pixels), strict=True):
        torch.testing.assert_close(same, stage, rtol=1e-4, atol=1e-4)


def test_a_token_unlike_all_others_is_the_rarest():
    tokens = torch.randn(1, 1, 8).repeat(2, 49, 1) + 0.1 * torch.randn(2, 49, 8)
    tokens[:, 17] = torch.randn(8) * 2
    deviation, statistics = rarity(tokens, 5)
    assert deviation.shape == (2, 49, 8)
    assert (statistics.argmax(1) == 17).all()
    others = torch.cdist(tokens[0, 3:4], tokens[0])[0]
    assert statistics[0, 3, 0] * 8**0.5 <= others[others > 0].max()


@pytest.mark.parametrize("part", [{"neighbours": 5}, {"rarity": True, "components": (40, 64, 96)}])
def test_a_tower_that_compares_by_halves_is_refused(part):
    with pytest.raises(ValueError, match="or none of them"):
        TowerConfig("tf_efficientnet_lite0", (3, 4, 5), 5, 14, **part)


def test_tokens_have_the_widths_that_the_tower_tells():
    tower = TimmTower(TOWER)
    stages = [torch.randn(1, 196, size) for size in tower.network.feature_info.channels()]
    levels, final = tower.tokens(stages)
    assert tuple(level.shape[-1] for level in levels) == tower.level_sizes
    assert final.shape == (1, 196, tower.hidden_size)
    assert torch.equal(levels[0][..., -18:], final[..., -18:])  # rarity of all stages


def test_a_shard_holds_pairs_whose_second_is_defective(shards):
    shard = shards[0]
    assert shard.labels.tolist() == [0, 1] * 3
    assert len(shard.masks) == sum(shard.crops_per_image)
    for image in range(6):
        one = shard.images([image])
        assert bool(one.masks.any()) == bool(one.labels[0])


def test_a_resumed_run_equals_an_uninterrupted_one(shards, weights, tmp_path, monkeypatch):
    whole = train_expert(shards, frozen_tower(weights), TRAINING, schedule(6), tmp_path / "whole")
    from looktwice_adapters.train.run import Run

    update = Run.update

    def interrupted(self, loss):
        if self.step == 4:
            raise InterruptedRunError
        return update(self, loss)

    monkeypatch.setattr(Run, "update", interrupted)
    with pytest.raises(InterruptedRunError):
        train_expert(shards, frozen_tower(weights), TRAINING, schedule(6), tmp_path / "parts")
    monkeypatch.setattr(Run, "update", update)
    again = train_expert(
        shards, frozen_tower(weights), TRAINING, schedule(6), tmp_path / "parts", resume=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_training_tells_the_pictures_it_saw_apart(shards, weights, tmp_path):
    expert = train_expert(shards[:1], frozen_tower(weights), TRAINING, schedule(40), tmp_path)
    with torch.no_grad():
        tokens = expert.tower.tokens([level.float() for level in shards[0].tokens])
        output = expert(*tokens, shards[0].crops_per_image)
    covered = shards[0].masks > 0.5
    assert output.significance[covered].mean() > 1.5 * output.significance[~covered].mean()


def test_a_soft_label_is_learnt_as_it_is_and_a_hard_one_as_yes_or_no():
    label = torch.full((4,), 0.6)
    shown = torch.linspace(0.05, 0.95, 19)
    for part in (0, 1):  # focal and dice
        soft, hard = (
            [float(map_losses(p.expand(4), label, soft)[part]) for p in shown]
            for soft in (True, False)
        )
        assert float(shown[np.argmin(soft)]) == pytest.approx(0.6)
        assert np.argmin(hard) == len(shown) - 1
    faint = torch.full((4,), 0.1)  # below COVERED, and yet something
    _, dice = map_losses(torch.full((4,), 0.3), faint, True)
    assert float(dice) == pytest.approx(1 - (2 * 4 * 0.03 + 1) / (4 * (0.09 + 0.01) + 1))
    sure = torch.tensor([0.0, 1.0, 1.0])
    given = torch.tensor([0.2, 0.7, 0.4])
    torch.testing.assert_close(map_losses(given, sure, True)[0], map_losses(given, sure, False)[0])


def test_soft_labels_reach_the_loss_of_a_step(shards, weights):
    expert = new_expert(TRAINING, frozen_tower(weights))
    batch = batch_at(0, shards, TRAINING)
    faint = replace(batch, masks=0.2 * batch.masks)  # nowhere above COVERED
    nothing = replace(batch, masks=torch.zeros_like(batch.masks))
    for soft in (True, False):
        training = replace(TRAINING, soft=soft)
        losses = [expert_loss(expert, seen, training, 0).item() for seen in (faint, nothing)]
        assert (losses[0] != losses[1]) is soft


def test_a_saved_expert_judges_as_before(shards, weights, tmp_path):
    expert = train_expert(shards, frozen_tower(weights), TRAINING, schedule(2), tmp_path / "run")
    name = save_expert(expert, tmp_path)
    section = json.loads((tmp_path / "expert.json").read_text())
    loaded = load_expert(tmp_path / "expert.safetensors", ExpertConfig.from_dict(section))
    assert len(name) == 16
    assert load_file(tmp_path / "expert.safetensors")["siglip_adaptors.0.weight"].shape[0] == 16
    picture = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    before = Detector(expert, AnyRes()).judge(picture)
    after = Detector(loaded, AnyRes()).judge(picture)
    assert after.score == pytest.approx(before.score, abs=2e-3)
    assert np.abs(after.anomaly_map - before.anomaly_map).max() < 0.05
    assert before.anomaly_map.shape == (300, 200)


def test_calibration_puts_the_threshold_between_the_classes():
    rng = np.random.default_rng(0)
    labels = np.array([False] * 60 + [True] * 20)
    scores = torch.from_numpy(1 / (1 + np.exp(-rng.normal(np.where(labels, 6, 3), 0.5))))
    pixels = torch.from_numpy(1 / (1 + np.exp(-rng.normal(np.repeat([-5, -1], 500), 1))))
    sets = np.array(["one", "two"] * 40)
    silent = torch.zeros(80)
    fitted = calibrate(scores, silent, labels, sets, scores, pixels, torch.arange(1000) >= 500)
    assert fitted.peak_scale == 0
    said = (fitted.score(scores) >= 0.5).numpy()
    assert (said == labels).mean() > 0.97
    quiet = (fitted.map(scores) < 0.5).numpy()
    assert quiet[~labels].mean() > 0.95
    assert (~quiet)[labels].mean() > 0.95


def test_the_map_reaches_a_half_in_as_many_pictures_as_are_anomalous():
    labels = np.repeat([False, True], 4)
    scores = torch.linspace(0.1, 0.9, 8)
    sets, silent = np.array(["one"] * 8), torch.zeros(8)
    fitted = calibrate(scores, silent, labels, sets, scores, scores, torch.from_numpy(labels))
    said = fitted.score(scores) >= 0.5
    assert said.tolist() == labels.tolist()
    assert (fitted.map(scores) > 0.49999).tolist() == labels.tolist()
