"""The shipped small checkpoint: stock software loads it, its parts fit, its answers agree."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from looktwice_adapters.anomaly_prompt import ADVERBS, phrase, prompt_length
from looktwice_adapters.checkpoint import load_expert
from looktwice_adapters.expert import ExpertConfig
from looktwice_adapters.train.hub_format import write_hashes
from looktwice_clients.doctor import models

NANO = Path(__file__).parents[2] / "models" / "nano"
CONFIG = json.loads((NANO / "config.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO)


@pytest.fixture(scope="module")
def loaded():
    return LlavaOnevisionForConditionalGeneration.from_pretrained(
        NANO, dtype=torch.float32, output_loading_info=True
    )


def test_the_folder_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 64 * 2**20


def test_the_list_of_hashes_and_the_model_card_name_what_is_shipped():
    listed = [line.split("  ") for line in (NANO / "SHA256SUMS").read_text().splitlines()]
    assert [name for _, name in listed] == ["expert.safetensors", "model.safetensors"]
    for digest, name in listed:
        assert hashlib.sha256((NANO / name).read_bytes()).hexdigest() == digest, name
    assert listed[0][0][:16] in (NANO / "README.md").read_text()


def test_the_doctor_finds_a_weight_that_differs_from_the_list(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("expert", "model"):
        save_file({"weight": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
    write_hashes(tmp_path)
    assert [finding.state for finding in models([tmp_path])] == ["ok", "ok"]
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    _, changed = models([tmp_path])
    assert changed.state == "problem"
    assert "model.safetensors is not as published" in changed.detail


def test_transformers_loads_every_tensor_and_misses_none(loaded):
    _, info = loaded
    assert not any(info.values()), info


def test_tensors_have_the_hubs_names_in_bfloat16():
    with safe_open(NANO / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {str(file.get_tensor(name).dtype) for name in names} == {"torch.bfloat16"}
    prefixes = ("vision_tower.vision_model.", "multi_modal_projector.linear_", "image_newline")
    assert all(name.startswith((*prefixes, "language_model.model.")) for name in names)
    index = json.loads((NANO / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(names, "model.safetensors")


def test_stock_vllm_takes_no_tensor_of_the_expert_for_one_of_the_model():
    weight_utils = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    files = [str(path) for path in NANO.glob("*.safetensors")]
    kept = weight_utils.filter_duplicate_safetensors_files(
        files, str(NANO), "model.safetensors.index.json"
    )
    assert [Path(file).name for file in kept] == ["model.safetensors"]


def test_the_phrases_have_equal_token_counts_and_stand_in_the_config(processor):
    ids = [processor.tokenizer(phrase(adverb))["input_ids"] for adverb in ADVERBS]
    assert len({len(row) for row in ids}) == 1
    assert CONFIG["anomaly_expert"]["phrase_token_ids"] == ids


def test_the_experts_section_fits_its_file():
    section = dict(CONFIG["anomaly_expert"])
    section.pop("phrase_token_ids")
    weights = section.pop("weights")
    assert section == json.loads((NANO / "expert.json").read_text())
    config = ExpertConfig.from_dict(section)
    assert config.llm_hidden_size == CONFIG["vision_config"]["hidden_size"]
    load_expert(NANO / weights, config)


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("Is it OK?", "Is it OK?"),
        ([{"type": "image"}, {"type": "text", "text": "Is it OK?"}], "<image>Is it OK?"),
        ([{"type": "text", "text": "Is it OK?"}, {"type": "image"}], "<image>Is it OK?"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}], "<image><image>?"),
        ([{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}], "One.\nTwo."),
        (None, ""),
    ],
)
def test_the_chat_template_takes_text_and_parts_pictures_first(processor, content, written):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{written}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_any_text_survives_the_tokenizer(processor):
    for text in (
        "Ist das Teil in Ordnung?",
        "部品に傷はありますか",
        "a\tb\r\n\r\n  c 12.5 %",
        "🙂",
    ):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(ids) == text


def test_decoding_is_greedy_by_default(loaded):
    generation = loaded[0].generation_config
    assert generation.do_sample is False
    assert generation.temperature == 0.0  # what vLLM reads
    assert generation.eos_token_id == 2


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (640, 480), (100, 900), (3000, 2000)])
def test_a_picture_takes_at_most_450_tokens(processor, loaded, size):
    image = Image.new("RGB", size, "gray")
    inputs = processor(text="<image>", images=[image], return_tensors="pt")
    crops = inputs["pixel_values"].shape[1]
    assert 2 <= crops <= 5
    with torch.no_grad():
        logits = loaded[0](**inputs).logits  # embeddings fill the slots exactly, or this raises
    assert logits.isfinite().all()
    assert inputs["input_ids"].shape[1] + prompt_length((2, 2), 6) <= 450
