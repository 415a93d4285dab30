"""AnomalyGPT's decoder, prompt ensembles and prompt learner against the published outputs."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, normalize

from looktwice_adapters.anomalygpt import AnomalyGPT, AnomalyGPTConfig, DecoderFileError
from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.decoder import class_probabilities, resized
from looktwice_adapters.losses import dice_loss, focal_loss
from looktwice_adapters.memory_bank import MemoryBank
from looktwice_adapters.prompt_ensemble import ABNORMAL, NORMAL, prompts, text_features
from looktwice_adapters.prompt_learner import PROMPTS, PromptLearner
from tests.golden import GOLDEN

CONFIG = AnomalyGPTConfig((6, 8), 5, 12, "none", "0123", channels=(2, 2, 3, 3, 4))


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "anomalygpt_outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return AnomalyGPT(CONFIG, normalize(torch.randn(2, 5), dim=-1))


def drawn_levels(crops, patches=9):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(crops, patches, size, generator=generator) for size in (6, 8)]


def test_zero_shot_map_equals_the_published_one(golden):
    probabilities = class_probabilities(list(golden["stages"]), golden["text"], 224)
    found = probabilities[:, :, 1].mean(0)[:, ::4, ::4]
    torch.testing.assert_close(found, golden["zero_shot_map"], atol=1e-5, rtol=0)


def test_the_losses_of_the_maps_equal_the_published_ones(golden):
    for index, maps in enumerate(class_probabilities(list(golden["stages"]), golden["text"], 224)):
        focal = focal_loss(maps, golden["mask"])
        dice = dice_loss(maps[:, 1], golden["mask"].float())
        torch.testing.assert_close(focal, golden["focal"][index], atol=0, rtol=1e-5)
        torch.testing.assert_close(dice, golden["dice"][index], atol=0, rtol=1e-5)


def test_a_few_shot_map_resized_for_the_learner_equals_the_published_one(golden):
    query, normal = list(golden["query"]), list(golden["normal"])
    distance = MemoryBank.of([normal]).distances(query).view(1, 1, 16, 16)
    found = resized(distance)[0, 0, ::4, ::4]
    torch.testing.assert_close(found, golden["few_shot_map"], atol=1e-5, rtol=0)


def restated_map(decoder, levels):
    """The formula once more, token by token."""
    total = 0
    for level, adapter in zip(levels, decoder.adapters, strict=True):
        tokens = level @ adapter.weight.T + adapter.bias
        cosines = [cosine_similarity(tokens, side, dim=-1) for side in decoder.text_features]
        total = total + torch.sigmoid(100 * (cosines[1] - cosines[0]))
    return (total / len(levels)).view(-1, 3, 3)


def test_map_and_gradients_equal_a_plain_restatement_of_the_formula(tiny):
    decoder, levels = tiny.decoder.double(), [0.01 * level.double() for level in drawn_levels(2)]
    found, expected = decoder.zero_shot_map(levels), restated_map(decoder, levels)
    torch.testing.assert_close(found, expected)
    weight = torch.arange(9.0, dtype=torch.double).view(3, 3)  # places count differently
    weights = list(decoder.parameters())
    gradients = torch.autograd.grad((weight * found).sum(), weights)
    expected_gradients = torch.autograd.grad((weight * expected).sum(), weights)
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, same)


def test_text_features_are_the_mean_of_each_class_of_prompts():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    sizes = {"layers": 1, "width": 32}
    tower = open_clip.CLIP(
        16, {**sizes, "patch_size": 16, "image_size": 32, "head_width": 16}, {**sizes, "heads": 2}
    ).eval()
    tokenize = open_clip.get_tokenizer("ViT-B-32")

    features = text_features(lambda texts: tower.encode_text(tokenize(texts)), "bottle")

    assert features.shape == (2, 16)
    with torch.no_grad():
        for feature, states in zip(features, (NORMAL, ABNORMAL), strict=True):
            texts = prompts(states, "bottle")
            each = [tower.encode_text(tokenize(text), normalize=True) for text in texts]
            torch.testing.assert_close(feature, normalize(torch.cat(each).mean(0), dim=-1))
    assert (features[0] - features[1]).norm() > 1e-3


def test_prompts_put_the_product_into_every_state_and_template():
    assert len(prompts(NORMAL)) == 14
    assert len(prompts(ABNORMAL)) == 10
    assert prompts(ABNORMAL, "bottle")[4:6] == [
        "a photo of a bottle with flaw.",
        "a photo of the bottle with flaw.",
    ]


def test_the_published_learner_turns_a_map_into_eighteen_prompts():
    learner = PromptLearner(32)
    assert [tuple(p.shape) for p in learner.meta_net.parameters() if p.ndim == 4] == [
        *((4, 1, 3, 3), (16, 4, 3, 3), (64, 16, 3, 3), (256, 64, 3, 3), (1024, 256, 3, 3)),
        (32, 1024, 5, 5),
    ]
    with torch.no_grad():
        found = learner(torch.rand(2, 14, 14))
    assert found.shape == (2, PROMPTS, 32)
    assert torch.equal(found[0, :9], learner.base_prompts)
    assert torch.equal(found[0, :9], found[1, :9])
    assert not torch.equal(found[0, 9:], found[1, 9:])


def test_the_prompt_of_a_cell_answers_to_the_map_there():
    torch.manual_seed(0)
    learner = PromptLearner(16)
    with torch.no_grad():
        calm, spot = torch.zeros(1, 28, 28), torch.zeros(1, 28, 28)
        spot[0, 24:, :4] = 1  # the bottom left corner
        change = (learner(spot) - learner(calm)).norm(dim=-1)[0, 9:]
    assert change.argmax() == 6
    assert change[2] < 1e-5 * change[6]


def test_the_text_loss_reaches_adapters_learner_and_base_prompts(tiny):
    tiny(drawn_levels(3), torch.empty(3, 9, 0), [2, 1]).prompts.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tiny.parameters())


def test_prompts_follow_the_base_views_map_alone(tiny):
    maps = torch.rand(5, 3, 3)
    with torch.no_grad():
        found = tiny.look_again(torch.empty(5, 9, 0), maps, [3, 2]).prompts
        torch.testing.assert_close(found, tiny.prompt_learner(maps[[0, 3]]))


def test_a_saved_file_judges_as_before_and_brings_its_sizes(tiny, tmp_path):
    tiny.save(tmp_path / "decoder.safetensors")
    loaded = AnomalyGPT.load(tmp_path / "decoder.safetensors")
    assert loaded.config == CONFIG
    levels, final = drawn_levels(2), torch.empty(2, 9, 0)
    with torch.no_grad():
        assert torch.equal(loaded(levels, final, [2]).score, tiny(levels, final, [2]).score)


def test_it_judges_in_float32_whatever_torchs_default(tiny, tmp_path):
    tiny.save(tmp_path / "decoder.safetensors")
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        loaded = AnomalyGPT.load(tmp_path / "decoder.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, tiny.state_dict()[name]), name


def test_a_decoder_of_another_checkpoint_is_refused_with_both_names(tmp_path):
    expert = tmp_path / "expert.safetensors"
    expert.write_bytes(b"weights")
    fitting = replace(CONFIG, expert=file_hash(expert))
    fitting.check(expert, 12)
    with pytest.raises(DecoderFileError, match=r"embeddings of 12, .* embeddings of 896; train"):
        fitting.check(expert, 896)
    with pytest.raises(DecoderFileError, match=f"expert 0123 .* expert {fitting.expert} "):
        CONFIG.check(expert, 12)


def test_a_file_that_is_no_decoder_is_refused_in_one_line(tmp_path):
    with pytest.raises(DecoderFileError, match="no decoder at"):
        AnomalyGPT.load(tmp_path / "missing.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    for name in ("other", "noise"):
        with pytest.raises(DecoderFileError, match="looktwice train decoder") as refused:
            AnomalyGPT.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(refused.value)


def test_a_decoder_without_its_text_features_says_so(tiny, tmp_path):
    path = tmp_path / "decoder.safetensors"
    tiny.save(path)
    state = load_file(path)
    del state["anomalygpt.decoder.text_features"]
    save_file(state, path, {"anomalygpt": json.dumps(asdict(CONFIG))})
    with pytest.raises(DecoderFileError, match="not all of one"):
        AnomalyGPT.load(path)
