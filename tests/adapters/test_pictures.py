"""The library of free pictures: its order is kept, and pictures that came or went are noticed."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from looktwice_adapters.train import pictures as module
from looktwice_adapters.train.features import ShardPlan, keep_plan, make_shards
from looktwice_adapters.train.pictures import open_library


def draw(folder, *names, side=140):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name)


def mine(library, folder):
    return [str(path.relative_to(folder)) for path in library.textures if folder in path.parents]


def test_pictures_that_came_or_went_are_noticed(tmp_path):
    draw(tmp_path, "walls/b.png", "walls/d.png")
    draw(tmp_path, "walls/icon.png", side=32)
    assert mine(open_library(tmp_path), tmp_path) == ["walls/b.png", "walls/d.png"]
    draw(tmp_path, "floors/z.png", "walls/c.png")
    (tmp_path / "walls" / "d.png").unlink()
    found = open_library(tmp_path)
    assert mine(found, tmp_path) == ["floors/z.png", "walls/b.png", "walls/c.png"]
    assert open_library(tmp_path) == found


def test_grey_pictures_and_names_of_ones_own_are_as_good_as_others(tmp_path):
    draw(tmp_path, "mine/pcb_smd.png", "mine/envelope.png", "ufoai-textures/wall_nm.png")
    Image.fromarray(np.eye(200, dtype=np.uint8) * 255).save(tmp_path / "mine" / "grey.png")
    relief = tmp_path / "ufoai-textures" / "relief.png"  # of a game's wall
    relief.write_bytes((tmp_path / "mine" / "grey.png").read_bytes())
    assert mine(open_library(tmp_path), tmp_path) == [
        *("mine/envelope.png", "mine/grey.png", "mine/pcb_smd.png")
    ]


def test_a_folder_of_nothing_to_train_on_says_what_is_wanted(tmp_path):
    draw(tmp_path, "walls/icon.png", side=32)
    with pytest.raises(ValueError, match="at least 128 px a side, and not of one even colour"):
        open_library(tmp_path)


def test_a_broken_plan_is_named(tmp_path):
    (tmp_path / "plan.json").write_text("")
    with pytest.raises(ValueError, match=r"plan\.json is no JSON .*: choose another --out"):
        keep_plan(tmp_path, {"seed": 0})


def test_an_index_from_before_keeps_its_order_to_the_byte(tmp_path, monkeypatch):
    draw(tmp_path, "walls/a.png", "walls/b.png")
    draw(tmp_path, "walls/icon.png", side=32)
    index = tmp_path / "library.txt"
    index.write_text("textures\twalls/b.png\ntextures\twalls/a.png\n")
    before = index.read_bytes()
    assert mine(open_library(tmp_path), tmp_path) == ["walls/b.png", "walls/a.png"]
    monkeypatch.setattr(module, "_shelf", None)  # nothing is looked at again
    assert mine(open_library(tmp_path), tmp_path) == ["walls/b.png", "walls/a.png"]
    assert index.read_bytes() == before


def test_features_are_known_by_the_pictures_they_were_made_of(tmp_path):
    draw(tmp_path / "pictures", "walls/a.png")
    plan = ShardPlan(tmp_path / "features", None, pictures=tmp_path / "pictures")
    make_shards(plan, 0, 1)
    make_shards(plan, 0, 1)
    draw(tmp_path / "pictures", "walls/b.png")
    with pytest.raises(ValueError, match=r"made with different settings \(library\); choose"):
        make_shards(plan, 0, 1)
    make_shards(replace(plan, folder=tmp_path / "other"), 0, 1)


def test_a_plan_that_says_nothing_of_the_library_is_another_one(tmp_path):
    draw(tmp_path / "pictures", "walls/a.png")
    plan = ShardPlan(tmp_path / "features", None, pictures=tmp_path / "pictures")
    make_shards(plan, 0, 1)
    path = plan.folder / "plan.json"
    lines = [line for line in path.read_text().splitlines() if '"library"' not in line]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"made with different settings \(library\); choose"):
        make_shards(plan, 0, 1)
