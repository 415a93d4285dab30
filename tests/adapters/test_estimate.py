"""Estimates: what fake tensors say equals what real ones keep and compute."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaOnevisionConfig

from looktwice_adapters.train.assistant import Example, Stage2, load_assistant
from looktwice_adapters.train.estimate import (
    Load,
    estimate_training,
    hub_config,
    kept_for_backward,
    measured_rate,
)
from looktwice_adapters.train.frozen_sight import Sight
from looktwice_clients.cli import run as looktwice

NANO = Path(__file__).parents[2] / "models" / "nano"
LOAD = Load((200, 300), text=20, answer=10)


@pytest.mark.parametrize("rank", [0, 8])
def test_the_estimate_equals_what_a_real_step_keeps(rank):
    stage = Stage2(lora_rank=rank)
    found = estimate_training(LlavaOnevisionConfig.from_pretrained(NANO), stage, LOAD)
    model, assistant, _ = load_assistant(NANO, stage)
    sight = Sight(torch.zeros(3, 64, 192), torch.zeros(3, 4, 192), torch.zeros(1, 192), 0,
                  (200, 300), (1, 2), "")  # fmt: skip
    ids = [5] * 15 + [model.config.image_token_id] + [5] * 15
    example = Example(ids, [-100] * 21 + [5] * 10, [sight])
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    weights |= {p.untyped_storage()._cdata for p in assistant.parameters()}
    with kept_for_backward(weights) as kept:
        loss = assistant([example])
    loss.backward()
    got = [p.grad is not None for p in assistant.parameters() if p.requires_grad]
    assert all(got)
    assert found.trained == sum(p.numel() for p in assistant.parameters() if p.requires_grad)
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.1)
    optimizer = torch.optim.AdamW([p for p in assistant.parameters() if p.requires_grad])
    optimizer.step()
    state = [v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim]
    assert found.optimizer == sum(state)


def test_checkpointing_takes_less_memory_and_more_work():
    config = LlavaOnevisionConfig.from_pretrained(NANO)
    kept, twice = (
        estimate_training(config, Stage2(checkpointing=way), LOAD) for way in (False, True)
    )
    assert twice.activations < 0.5 * kept.activations
    assert 1.05 * kept.operations < twice.operations < 4 / 3 * kept.operations
    assert twice.optimizer == kept.optimizer


def test_layers_computed_twice_cost_a_whole_forward_pass_also_where_adapters_alone_learn():
    config = LlavaOnevisionConfig.from_pretrained(NANO)
    kept, twice = (
        estimate_training(config, Stage2(lora_rank=4, checkpointing=way), LOAD)
        for way in (False, True)
    )
    assert 1.25 * kept.operations < twice.operations < 1.5 * kept.operations


def test_attention_is_counted_as_if_it_were_matrix_products():
    fused, plain = (LlavaOnevisionConfig.from_pretrained(NANO) for _ in range(2))
    plain._attn_implementation = "eager"
    long = Load((200, 300), text=3000, answer=10)
    found, expected = (estimate_training(one, Stage2(), long) for one in (fused, plain))
    # Fused attention computes its scores once more on the way back.
    assert expected.operations < found.operations < 1.15 * expected.operations


def test_the_hubs_half_billion_has_its_parameters():
    with torch.device("meta"):
        from transformers import LlavaOnevisionForConditionalGeneration

        model = LlavaOnevisionForConditionalGeneration(hub_config("0.5b"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.894e9, rel=0.01)


def test_this_machine_multiplies():
    assert measured_rate(128, 0.05) > 1e8


def test_the_command_prints_one_object(capsys):
    options = ["--model", str(NANO), "--lora", "4", "--tflops", "1", "--utilisation", "0.5"]
    assert looktwice(["train", "estimate", *options, "--conversations", "3600", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hours"] == pytest.approx(said["operations"] / 0.5e12)
    assert said["memory"] == sum(
        said[name] for name in ("weights", "gradients", "optimizer", "activations")
    )


def test_neither_model_nor_size_is_refused(capsys):
    assert looktwice(["train", "estimate"]) == 2
    assert "either --model or --size" in capsys.readouterr().err
