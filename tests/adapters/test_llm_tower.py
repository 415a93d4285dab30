"""An expert on the LLM's own tower, as published: tapped, trained, saved, loaded, judging."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaOnevisionForConditionalGeneration

from looktwice_adapters.checkpoint import load_expert, section_beside
from looktwice_adapters.datasets import AnyRes, read_image
from looktwice_adapters.detector import Detector
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.few_shot import build
from looktwice_adapters.llm_tower import PUBLISHED, LlmTower, tapped
from looktwice_adapters.shipped import CHECKOUT_MODELS
from looktwice_adapters.train.expert import KEY_SIZE, ExpertTraining, save_expert, train_expert
from looktwice_adapters.train.features import Shard, ShardPlan, make_shard, read_shard
from looktwice_adapters.train.frozen_sight import read_section
from looktwice_adapters.train.run import Schedule, TrainingError
from looktwice_server.launch import expert_section
from tests.punched_plates import plate

NANO = CHECKOUT_MODELS / "nano"
SCRATCHED = Path(__file__).parents[2] / "examples" / "scratched.png"
TRAINING = ExpertTraining(pairs=2, embed_size=16, key_size=16)


@pytest.fixture(scope="module")
def tower() -> LlmTower:
    return LlmTower.from_checkpoint(NANO)


@pytest.fixture(scope="module")
def shards(tower: LlmTower, tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    plan = ShardPlan(
        tmp_path_factory.mktemp("features"),
        weights=None,
        kinds=("lesion", "dead_area"),
        pairs=3,
        anyres=AnyRes.of_checkpoint(NANO),
        grid=tower.config.grid,
    )
    return [read_shard(make_shard(plan, 0))]


@pytest.fixture(scope="module")
def trained(tower: LlmTower, shards: list[Shard], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an expert that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("expert")
    schedule = Schedule(3, 1e-3, warmup=1, save_every=3, log_every=1)
    save_expert(train_expert(shards, tower, TRAINING, schedule, folder), folder)
    return folder / "expert.safetensors"


def test_it_is_tapped_at_the_published_depths() -> None:
    assert tapped(26, 27) == PUBLISHED
    assert tapped(8, 8).levels == (2, 4, 6, 8)


def test_its_tokens_are_the_hidden_states_of_the_checkpoints_tower(tower: LlmTower) -> None:
    whole = LlavaOnevisionForConditionalGeneration.from_pretrained(NANO).float()
    pixels = torch.randn(9, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    levels, final = LlmTower(tower.config, tower.vision.float())(pixels)
    assert [tuple(level.shape) for level in levels] == [(9, 64, 192)] * 4
    for layer, level in zip(tower.config.levels, levels, strict=True):
        torch.testing.assert_close(level, states[layer])
    torch.testing.assert_close(final, states[-1])


def test_a_shard_for_it_holds_the_crops(shards: list[Shard]) -> None:
    [crops] = shards[0].tokens
    assert crops.dtype == torch.uint8
    assert crops.shape[1:] == (3, 224, 224)
    assert shards[0].masks.shape == (len(crops), 8, 8)


def test_what_learns_is_saved_and_the_tower_is_not(trained: Path, tower: LlmTower) -> None:
    state = load_file(trained)
    assert not [name for name in state if name.startswith("tower.")]
    expert = load_expert(trained, ExpertConfig.from_dict(section_beside(trained)))
    assert expert.config.tower == tower.config
    assert expert.config.level_sizes == tower.level_sizes == (192,) * 4
    assert state["q_former.key_proj.weight"].shape == (KEY_SIZE, 192)


def test_a_run_with_another_models_tower_is_not_resumed(
    tower: LlmTower, shards: list[Shard], tmp_path: Path
) -> None:
    schedule = Schedule(0, 1e-3)
    train_expert(shards, tower, TRAINING, schedule, tmp_path)
    other = copy.deepcopy(tower)
    next(other.parameters()).data.mul_(2)
    with pytest.raises(TrainingError, match=r"other options \(model\)"):
        train_expert(shards, other, TRAINING, schedule, tmp_path, True)


def test_training_moves_every_part_of_the_expert_and_nothing_of_the_tower(
    tower: LlmTower, shards: list[Shard], tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in tower.state_dict().items()}

    def after(steps: int) -> dict[str, torch.Tensor]:
        schedule = Schedule(steps, 1e-3, warmup=1, save_every=9, log_every=9)
        expert = train_expert(shards, tower, TRAINING, schedule, tmp_path / str(steps))
        return {n: v for n, v in expert.state_dict().items() if not n.startswith("tower.")}

    start, end = after(0), after(4)
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture(scope="module")
def detector(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Of a checkpoint that brings the trained expert."""
    folder = tmp_path_factory.mktemp("checkpoint") / "nano"
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("expert.*"))
    config = json.loads((folder / "config.json").read_text())
    config["anomaly_expert"] = section_beside(trained) | {"weights": trained.name}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(trained, folder)
    return Detector.from_folder(folder)


def test_a_checkpoint_with_it_judges_in_process(detector: Detector) -> None:
    picture = read_image(SCRATCHED)
    judgement = detector.judge(picture)
    assert 0 <= judgement.score <= 1
    assert judgement.anomaly_map.shape == picture.shape[:2]


def test_references_are_compared_by_its_tokens(detector: Detector) -> None:
    good = [np.array(plate(seed)) for seed in range(4)]
    looked, grid = detector.look_alike(good)
    reference = build(looked, grid=grid).reference
    unseen, square = (
        detector.judge(np.array(plate(seed, square=defect)), reference)
        for seed, defect in ((100, False), (101, True))
    )
    assert unseen.score < square.score
    assert unseen.verdict == "normal"


def test_the_server_and_stage_2_take_it_with_its_sizes(trained: Path) -> None:
    assert expert_section(str(NANO), trained, None)["tower"]["name"] == "llm"
    assert read_section(NANO, trained)[1].tower.levels == (2, 4, 6, 8)
