"""`--adapter anomalygpt`: what is refused before the start, and what a server then answers."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import normalize

from looktwice_adapters.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.detector import Detector, expert_file
from looktwice_adapters.few_shot import FewShotJudgement, build
from looktwice_adapters.shipped import CHECKOUT_MODELS
from looktwice_server.launch import serve
from tests.parity.pictures import draw
from tests.parity.reference import Reference
from tests.punched_plates import plate
from tests.server.wire import Sent, ask, chat, data_uri, encoded, image, inspect, text
from tests.serving import Server, running_server

NANO = CHECKOUT_MODELS / "nano"
QUESTION = "Is there a defect in this picture?"
TOKENS = 12


def drawn_parts() -> AnomalyGPT:
    """Untrained parts of nano's sizes, whose maps differ from place to place."""
    sizes = Detector.from_folder(NANO).expert.config.level_sizes
    llm_size = json.loads((NANO / "config.json").read_text())["text_config"]["hidden_size"]
    expert = file_hash(expert_file(NANO))
    config = AnomalyGPTConfig(sizes, 16, llm_size, "drawn", expert, channels=(4, 4, 8, 8, 16))
    torch.manual_seed(3)
    return AnomalyGPT(config, normalize(torch.randn(2, 16), dim=-1))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    drawn_parts().save(path)
    return path


def refusal(monkeypatch, *flags: str) -> str:
    """The one line with which the launcher ends."""
    launch = "looktwice_server.launch"
    monkeypatch.setattr(f"{launch}.is_child", lambda: True)
    monkeypatch.setattr(f"{launch}.end_with_parent", lambda: None)
    monkeypatch.setattr(f"{launch}.prepare_environment", lambda settings: None)
    result = CliRunner().invoke(serve, ["nano", *flags])
    assert result.exit_code in (1, 2), result.output
    return result.output.strip().splitlines()[-1]


def test_a_checkpoint_without_trained_parts_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("looktwice_adapters.anomalygpt.FILE_NAME", "absent.safetensors")
    line = refusal(monkeypatch, "--adapter", "anomalygpt")
    assert "brings no trained decoder" in line
    assert "looktwice train decoder" in line


def test_parts_for_another_tower_or_model_are_refused_by_name(monkeypatch, tmp_path):
    parts = drawn_parts()
    wrong = {
        "trained for expert 0123 ": replace(parts.config, expert="0123"),
        "embeddings of 896": replace(parts.config, llm_size=896),
    }
    for said, config in wrong.items():
        path = tmp_path / "decoder.safetensors"
        AnomalyGPT(config).save(path)
        assert said in refusal(monkeypatch, "--adapter", "anomalygpt", "--decoder", str(path))


def test_a_file_without_a_decoder_is_refused_by_name(monkeypatch):
    expert = str(NANO / "expert.safetensors")
    line = refusal(monkeypatch, "--adapter", "anomalygpt", "--decoder", expert)
    assert "expert.safetensors holds no decoder" in line


def test_a_decoder_for_the_other_adapter_is_a_usage_error(monkeypatch, decoder):
    assert "--adapter anomalygpt" in refusal(monkeypatch, "--decoder", str(decoder))


class Plain:
    """nano and the parts in plain torch and transformers."""

    def __init__(self, decoder: Path) -> None:
        self.reference, self.parts = Reference.of_folder(NANO), AnomalyGPT.load(decoder)

    @torch.inference_mode()
    def see(self, picture, judged: FewShotJudgement | None = None) -> tuple[float, torch.Tensor]:
        """Score, and the picture's embeddings: image tokens, phrase, prompts."""
        reference, model = self.reference, self.reference.model.model
        inputs = reference.processor.image_processor(picture, return_tensors="pt")
        seen = model.vision_tower(inputs.pixel_values[0], output_hidden_states=True)
        tokens = seen.hidden_states[model.config.vision_feature_layer]
        levels, final = reference.own_tokens(inputs.pixel_values[0])
        if judged is None:
            output = self.parts(levels, final, [len(final)])
            score = float(output.score[0])
        else:
            output = self.parts.look_again(final, judged.anomaly_map, [len(final)])
            score = judged.score
        [image], _ = model.pack_image_features(
            [model.multi_modal_projector(tokens)],
            torch.tensor([[picture.height, picture.width]]),
            model.image_newline,
        )
        phrase = reference.embed(reference.phrases[(score >= 0.3) + (score >= 0.7)])
        return score, torch.cat((image, phrase, output.prompts[0]))

    def reply(self, embedded: torch.Tensor) -> tuple[int, str]:
        """The length of the prompt with a picture's embeddings, and the answer to QUESTION."""
        template = "<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n"
        prompt = self.reference.prompt(template.format(QUESTION), [embedded])
        said = self.reference.answer(prompt, TOKENS)
        tokenizer = self.reference.processor.tokenizer
        return len(prompt), tokenizer.decode(said, skip_special_tokens=True)


@pytest.fixture(scope="module")
def plain(decoder) -> Plain:
    return Plain(decoder)


@pytest.fixture(scope="module")
def detector(decoder) -> Detector:
    return Detector.from_folder(NANO, decoder)


@pytest.fixture(scope="module")
def served(decoder, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("anomalygpt")
    flags = ("nano", "--dtype", "float32", "--adapter", "anomalygpt", "--decoder", str(decoder))
    store = str(folder / "references")
    with running_server(folder / "log", *flags, LOOKTWICE_REFERENCES=store) as server:
        yield server


def uri(picture: Image.Image) -> str:
    return data_uri(encoded(picture))


def asked(server: Server, picture: Image.Image, **keys) -> dict:
    """The answer to QUESTION by the papers' layout of the prompt."""
    keys = {"inspection": {"grounding": False, **keys}, "max_tokens": TOKENS}
    answer = ask(server, chat(image(uri(picture)), text(QUESTION), **keys))
    assert answer.status == 200, answer.data
    return answer.data


@pytest.mark.parametrize("size", [(224, 224, 0), (640, 480, 1), (300, 900, 2)])
def test_scores_and_answers_equal_the_same_parts_in_plain_torch(served, plain, decoder, size):
    picture = draw(*size)
    score, embedded = plain.see(picture)
    answer = asked(served, picture)
    [inspection] = answer["inspections"]
    assert inspection["score"] == pytest.approx(score, abs=1e-4)
    assert inspection["expert"] == file_hash(decoder)
    length, said = plain.reply(embedded)
    assert answer["usage"]["prompt_tokens"] == length
    assert answer["choices"][0]["message"]["content"] == said


def test_inspections_without_the_language_model_equal_the_detectors(served, detector):
    for size in ((224, 224, 0), (640, 480, 1), (300, 900, 2)):
        picture = draw(*size)
        [inspection] = ask(served, inspect(uri(picture), map=True)).data["data"]
        judged = detector.judge(np.array(picture))
        assert inspection["score"] == pytest.approx(judged.score, abs=1e-4)
        assert inspection["verdict"] == judged.verdict
        with Image.open(BytesIO(base64.b64decode(inspection["map"]["png"]))) as sent:
            difference = np.abs(np.asarray(sent) / 255 - judged.anomaly_map)
        assert difference.max() < 1 / 255


def test_references_and_decoder_judge_together(served, detector, plain, decoder):
    good = [plate(seed) for seed in range(6)]
    images = {"images": [uri(picture) for picture in good]}
    made = ask(served, Sent("/v1/references/plates", images, "PUT"), timeout=120)
    assert made.data["expert"] == file_hash(decoder)
    reference = build([detector.look(np.array(picture)) for picture in good]).reference
    for picture in (plate(100), plate(101, square=True)):
        answer = asked(served, picture, reference="plates")
        [inspection] = answer["inspections"]
        assert inspection["reference"]["version"] == made.data["version"]
        judged = reference.judge(detector.look(np.array(picture)))
        assert inspection["score"] == pytest.approx(judged.score, abs=0.01)
        assert (inspection["verdict"], inspection["p_value"]) == (judged.verdict, judged.p_value)
        _, embedded = plain.see(picture, judged)
        assert answer["choices"][0]["message"]["content"] == plain.reply(embedded)[1]
