"""What the launcher makes of vLLM's flags."""

from pathlib import Path

import pytest
import yaml

from looktwice_server.errors import SettingsError
from looktwice_server.launch import CHECKOUT_MODELS, CPU_CACHE_BYTES, serve, vllm_arguments

NANO = str(CHECKOUT_MODELS / "nano")
VALUES = Path(__file__).parents[2] / "docker" / "kubernetes" / "values.yaml"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)


def test_on_a_cpu_nothing_is_compiled_and_little_memory_taken():
    args = vllm_arguments(NANO, [])
    assert args.enforce_eager
    assert args.kv_cache_memory_bytes == CPU_CACHE_BYTES


@pytest.mark.parametrize("flag", ["--gpu-memory-utilization=0.3", "--gpu_memory_utilization=0.3"])
def test_a_given_share_of_memory_is_left_to_vllm(flag):
    args = vllm_arguments(NANO, [flag])
    assert args.gpu_memory_utilization == 0.3
    assert args.kv_cache_memory_bytes is None


def test_compilation_can_be_asked_for():
    assert not vllm_arguments(NANO, ["--no-enforce-eager"]).enforce_eager


@pytest.mark.parametrize(
    ("has", "flags", "dtype"),
    [
        (False, [], "float32"),
        (True, [], "auto"),
        (False, ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_a_cpu_without_bfloat16_serves_in_float32_unless_told(monkeypatch, has, flags, dtype):
    monkeypatch.setattr("looktwice_adapters.precision.has_bfloat16", lambda device: has)
    assert vllm_arguments(NANO, flags).dtype == dtype


@pytest.mark.parametrize(
    "flags",
    [
        ["--pipeline-parallel-size", "2"],
        ["--enable-prompt-embeds"],
        ["--enable-mm-embeds"],
        ["--grpc"],
        ["--trust-request-mm-kwargs"],
        ["--limit-mm-per-prompt", '{"image": 2}'],
        ["--mm-processor-cache-gb", "1"],
        ["--worker-extension-cls", "mine.Worker"],
    ],
)
def test_what_cannot_work_with_inspections_is_refused_by_name(flags):
    with pytest.raises(SettingsError, match=flags[0]):
        vllm_arguments(NANO, flags)


def chart_command(tmp_path):
    """What the chart's values make of `serve`: the model and its arguments, the expert at hand."""
    [spec] = yaml.safe_load(VALUES.read_text())["servingEngineSpec"]["modelSpec"]
    assert spec["vllmConfig"].keys() == {"extraArgs"}  # the chart makes flags of other keys
    expert = tmp_path / "expert.pth"
    expert.touch()
    flags = [
        str(expert) if flag.endswith(".pth") else flag for flag in spec["vllmConfig"]["extraArgs"]
    ]
    return [spec["modelURL"], *flags]


def parsed(command):
    """The command's own options, and vLLM's arguments."""
    context = serve.make_context("serve", list(command))
    return context.params, vllm_arguments(context.params["model"], context.args)


def test_the_kubernetes_values_name_arguments_that_serve_takes(tmp_path):
    model, *flags = chart_command(tmp_path)
    options, args = parsed([model, *flags])
    assert (options["model"], args.model_tag) == (model, model)
    assert options["expert"] == tmp_path / "expert.pth"


def test_a_wrong_flag_beside_the_kubernetes_values_is_noticed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed([*chart_command(tmp_path), "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err
