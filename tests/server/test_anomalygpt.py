"""`--adapter anomalygpt`: what is refused before the start, and what a server then answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import normalize

from looktwice_adapters.anomalygpt import AnomalyGPT, AnomalyGPTConfig
from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.expert import ExpertConfig
from looktwice_server.launch import CHECKOUT_MODELS, serve
from tests.parity.pictures import draw
from tests.parity.reference import Reference
from tests.serving import running_server

NANO = CHECKOUT_MODELS / "nano"
QUESTION = "Is there a defect in this picture?"
TOKENS = 12


def drawn_parts() -> AnomalyGPT:
    """Untrained parts of nano's sizes, whose maps differ from place to place."""
    config = json.loads((NANO / "config.json").read_text())
    section = config["anomaly_expert"]
    sizes = {k: v for k, v in section.items() if k not in ("weights", "phrase_token_ids")}
    torch.manual_seed(3)
    return AnomalyGPT(
        AnomalyGPTConfig(
            ExpertConfig.from_dict(sizes).level_sizes,
            16,
            config["text_config"]["hidden_size"],
            "drawn",
            file_hash(NANO / section["weights"]),
            channels=(4, 4, 8, 8, 16),
        ),
        normalize(torch.randn(2, 16), dim=-1),
    )


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
        "tower of expert 0123": replace(parts.config, expert="0123"),
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
    def see(self, picture) -> tuple[float, torch.Tensor]:
        """Score, and the picture's embeddings: image tokens, phrase, prompts."""
        reference, model = self.reference, self.reference.model.model
        inputs = reference.processor.image_processor(picture, return_tensors="pt")
        seen = model.vision_tower(inputs.pixel_values[0], output_hidden_states=True)
        tokens = seen.hidden_states[model.config.vision_feature_layer]
        levels, final = reference.own_tokens(inputs.pixel_values[0])
        output = self.parts(levels, final, [len(final)])
        [image], _ = model.pack_image_features(
            [model.multi_modal_projector(tokens)],
            torch.tensor([[picture.height, picture.width]]),
            model.image_newline,
        )
        score = float(output.score[0])
        phrase = reference.embed(reference.phrases[(score >= 0.3) + (score >= 0.7)])
        return score, torch.cat((image, phrase, output.prompts[0]))


@pytest.mark.server
def test_scores_and_answers_equal_the_same_parts_in_plain_torch(decoder, tmp_path):
    from openai import OpenAI

    from looktwice_clients.images import to_wire

    plain = Plain(decoder)
    template = "<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n"
    flags = ("nano", "--dtype", "float32", "--adapter", "anomalygpt", "--decoder", str(decoder))
    with running_server(tmp_path / "log", *flags) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        for size in ((224, 224, 0), (640, 480, 1), (300, 900, 2)):
            picture = draw(*size)
            path = tmp_path / "picture.png"
            picture.save(path)
            score, embedded = plain.see(picture)
            image = {"type": "image_url", "image_url": {"url": to_wire(path)}}
            answer = client.chat.completions.create(
                model="looktwice-nano",
                messages=[{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}],
                max_tokens=TOKENS,
                temperature=0,
                extra_body={"inspection": {"grounding": False}},
            )
            [inspection] = answer.model_extra["inspections"]
            assert inspection["score"] == pytest.approx(score, abs=1e-4)
            assert inspection["expert"] == file_hash(decoder)
            prompt = plain.reference.prompt(template.format(QUESTION), [embedded])
            assert answer.usage.prompt_tokens == len(prompt)
            tokenizer = plain.reference.processor.tokenizer
            said = tokenizer.decode(
                plain.reference.answer(prompt, TOKENS), skip_special_tokens=True
            )
            assert answer.choices[0].message.content == said
