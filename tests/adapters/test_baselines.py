"""Baselines on weights that are at hand: random ones, and EfficientNet-lite0's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from looktwice_adapters.evaluate.baselines import BaselineError, baseline
from looktwice_adapters.evaluate.judge import ReferencesError
from looktwice_adapters.evaluate.run import read_products

winclip = pytest.importorskip("anomalib.models.image.winclip.torch_model")
open_clip = pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {
        **{"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    },
    "text_cfg": {
        **{"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A model of open_clip that takes no time."""
    path = tmp_path_factory.mktemp("clip") / "tiny-test.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return "tiny-test@random"


@pytest.fixture
def samples(cups):
    [(references, test)] = read_products([cups], shots=3)["cup"].values()
    return references, test


class BrightIsDamaged(torch.nn.Module):
    """Stands for CLIP: pictures and prompts are (normality, damage)."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_text(self, tokens):
        normal = len(tokens) == 7 * 21  # states x templates of WinCLIP; 4 x 21 of damaged
        return torch.tensor([[1.0, 0.0] if normal else [0.0, 1.0]])

    def encode_image(self, pixels):
        share = (pixels.mean(1) > 1.5).float().mean((1, 2))
        return torch.stack([1 - share, 10 * share], dim=1)


@pytest.mark.parametrize("kind", ["clip", "winclip"])
def test_any_open_clip_model_gives_a_score_and_windows_a_map(tiny_clip, samples, kind):
    judge = baseline(f"{kind}:{tiny_clip}", 0)
    judge.prepare("cup", [])
    judgement = judge.judge(samples[1][0])
    assert 0 <= judgement.score <= 1
    assert judgement.verdict == ("anomalous" if judgement.score >= 0.5 else "normal")
    if kind == "winclip":
        assert judgement.anomaly_map.shape == (6, 6)
        assert ((judgement.anomaly_map >= 0) & (judgement.anomaly_map <= 1)).all()
    else:
        assert judgement.anomaly_map is None
    assert "random" in judge.name


def test_random_weights_are_the_seeds(tiny_clip, samples):
    def score(seed):
        judge = baseline(f"clip:{tiny_clip}", seed)
        judge.prepare("cup", [])
        return judge.judge(samples[1][0]).score

    assert score(0) == score(0) != score(1)


def test_windows_find_where_the_picture_looks_damaged(tiny_clip, samples):
    judge = baseline(f"winclip:{tiny_clip}", 0)
    judge.model = BrightIsDamaged()
    judge.prepare("cup", [])
    normal = next(judge.judge(sample) for sample in samples[1] if not sample.anomalous)
    damaged = next(judge.judge(sample) for sample in samples[1] if sample.anomalous)
    assert damaged.score > normal.score
    row, column = np.unravel_index(damaged.anomaly_map.argmax(), (6, 6))
    assert 1 <= row <= 3  # the square covers rows 1.9 to 3.8 and columns 2.3 to 3.8 of six
    assert 2 <= column <= 3


def test_scales_are_brought_together_as_anomalib_does(tiny_clip, samples, monkeypatch):
    judge = baseline(f"winclip:{tiny_clip}", 0)
    asked = []

    def scores(pictures):
        asked.append(torch.rand(len(pictures), generator=torch.Generator().manual_seed(len(asked))))
        return asked[-1]

    judge._scores = scores
    judgement = judge.judge(samples[1][0])
    whole, *windows = asked
    monkeypatch.setattr(winclip, "class_scores", lambda scores, *_, **__: scores)
    masks = [winclip.make_masks((6, 6), cells) for cells in (2, 3)]
    model = SimpleNamespace(
        scales=(2, 3), grid_size=(6, 6), masks=masks, text_embeddings=None, temperature=None
    )
    theirs = winclip.WinClipModel._compute_zero_shot_scores(
        model, whole, [one[None] for one in windows]
    )
    np.testing.assert_allclose(judgement.anomaly_map, theirs[0].numpy(), rtol=1e-6)
    assert judgement.score == float(whole[0])  # zero-shot, the picture's alone


@pytest.mark.parametrize("kind", ["patchcore", "padim"])
def test_patch_memories_find_what_the_references_do_not_have(samples, kind):
    references, test = samples
    judge = baseline(kind, 0)
    judge.prepare("cup", references)
    normal = max(judge.judge(sample).score for sample in test if not sample.anomalous)
    sample = next(sample for sample in test if sample.anomalous)
    judgement = judge.judge(sample)
    assert judgement.score > normal
    assert judgement.verdict is None
    height, width = judgement.anomaly_map.shape
    row, column = np.unravel_index(judgement.anomaly_map.argmax(), (height, width))
    assert 20 / 64 - 0.1 <= row / height <= 40 / 64 + 0.1
    assert 30 / 80 - 0.1 <= column / width <= 50 / 80 + 0.1


def test_a_coreset_is_the_seeds(samples):
    def kept(seed):
        judge = baseline("patchcore", seed)
        judge.prepare("cup", samples[0] * 6)  # more than keep every patch
        return judge.model.memory_bank

    first = kept(0)
    assert len(first) == 18 * 32 * 32 // 10
    assert torch.equal(first, kept(0))
    assert not torch.equal(first, kept(1))


@pytest.mark.parametrize(("kind", "given", "least"), [("patchcore", 0, 1), ("padim", 1, 2)])
def test_patch_memories_say_how_many_references_they_need(samples, kind, given, least):
    with pytest.raises(ReferencesError, match=f"--shots {least} or more"):
        baseline(kind, 0).prepare("cup", samples[0][:given])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("clip:no-such-model@x", "open_clip knows no model 'no-such-model'"),
        ("clip:ViT-B-32", "say which weights"),
        ("clip:ViT-B-32@no_such_tag", "no weights 'no_such_tag'"),
        ("patchcore:no_such_network", "no network 'no_such_network'"),
    ],
)
def test_what_cannot_be_had_says_so_in_one_line(spec, says):
    with pytest.raises(BaselineError) as caught:
        baseline(spec, 0)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
