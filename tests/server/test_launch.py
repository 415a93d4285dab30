"""What the launcher makes of vLLM's flags."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from looktwice_adapters.checkpoint import ExpertFileError
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig
from looktwice_adapters.shipped import CHECKOUT_MODELS
from looktwice_adapters.towers import TowerConfig
from looktwice_server import launch
from looktwice_server.errors import SettingsError
from looktwice_server.launch import (
    CPU_CACHE_BYTES,
    expert_section,
    serve,
    vllm_arguments,
)
from looktwice_server.settings import MOST_PIXELS, Settings

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
    ("flags", "backend"),
    [([], "guidance"), (["--structured-outputs-config.backend", "xgrammar"], "xgrammar")],
)
def test_one_backend_writes_all_structured_outputs(flags, backend):
    assert vllm_arguments(NANO, flags).structured_outputs_config.backend == backend


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
        ["--runner", "pooling"],
        ["--language-model-only"],
        ["--mm-encoder-only"],
        ["--limit-mm-per-prompt", '{"image": 2}'],
        ["--mm-processor-cache-gb", "1"],
        ["--worker-extension-cls", "mine.Worker"],
    ],
)
def test_what_cannot_work_with_inspections_is_refused_by_name(flags):
    with pytest.raises(SettingsError, match=flags[0]):
        vllm_arguments(NANO, flags)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_size": 48, "level_sizes": (48,)}, "48 channels, this one has 192"),
        ({"levels": (9,)}, "9 layers, this one has 8"),
        ({"grid": 7}, "7 tokens a side, this one has 8"),
    ],
)
def test_an_expert_of_another_checkpoint_is_refused_before_anything_starts(tmp_path, changed, says):
    sizes = {"hidden_size": 192, "level_sizes": (192,)}
    taps = {"levels": (7,), "final": 8, "grid": 8}
    sizes |= {key: value for key, value in changed.items() if key in sizes}
    taps |= {key: value for key, value in changed.items() if key in taps}
    config = ExpertConfig(**sizes, tower=TowerConfig(**taps))
    file = tmp_path / "expert.safetensors"
    save_file(AnomalyExpert(config).state_dict(), file)
    section = {"hidden_size": sizes["hidden_size"], "level_sizes": sizes["level_sizes"]}
    file.with_suffix(".json").write_text(json.dumps(section | {"tower": taps}))
    with pytest.raises(ExpertFileError, match=says):
        expert_section(NANO, file, None)


@pytest.mark.parametrize(
    "flags",
    [["--shutdown-timeout", "60"], ["--shutdown-timeout=60"], ["nano", "--shutdown_timeout", "60"]],
)
def test_open_requests_get_the_time_that_was_asked_for(monkeypatch, flags):
    monkeypatch.setattr(launch, "supervise", lambda grace: grace)
    with pytest.raises(SystemExit) as ended:
        serve.main(flags)
    assert ended.value.code == 70


def chart_command(tmp_path):
    """What the chart makes of its values: the model and its arguments, the expert at hand."""
    [spec] = yaml.safe_load(VALUES.read_text())["servingEngineSpec"]["modelSpec"]
    config = spec["vllmConfig"]
    assert config.keys() == {"enablePrefixCaching", "extraArgs"}  # the chart makes flags of others
    expert = tmp_path / "expert.pth"
    expert.touch()
    flags = [str(expert) if flag.endswith(".pth") else flag for flag in config["extraArgs"]]
    caching = (
        "--enable-prefix-caching" if config["enablePrefixCaching"] else "--no-enable-prefix-caching"
    )
    return [spec["modelURL"], "--host", "0.0.0.0", "--port", "8000", caching, *flags]


def parsed(command):
    """The command's own options, and vLLM's arguments."""
    context = serve.make_context("serve", list(command))
    return context.params, vllm_arguments(context.params["model"], context.args)


def test_the_kubernetes_values_name_arguments_that_serve_takes(tmp_path):
    model, *flags = chart_command(tmp_path)
    options, args = parsed([model, *flags])
    assert (options["model"], args.model_tag) == (model, model)
    assert options["expert"] == tmp_path / "expert.pth"
    assert (options["host"], options["port"]) == ("0.0.0.0", 8000)
    assert args.enable_prefix_caching


def test_a_wrong_flag_beside_the_kubernetes_values_is_noticed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parsed([*chart_command(tmp_path), "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err


def test_an_empty_folder_of_references_is_none_named(monkeypatch):
    monkeypatch.setenv("LOOKTWICE_REFERENCES", "")
    assert Settings.from_environment().references == Settings().references


def test_pictures_that_cannot_be_opened_are_not_promised(monkeypatch):
    monkeypatch.setenv("LOOKTWICE_MAX_PIXELS", "178956970")
    assert Settings.from_environment().max_pixels == MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("LOOKTWICE_MAX_PIXELS", "178956971")
    with pytest.raises(SettingsError, match="MAX_PIXELS must be at most 178956970"):
        Settings.from_environment()


@pytest.mark.parametrize("bits", ["1", "120", "4095"])
def test_a_depth_that_no_sensor_has_is_refused(monkeypatch, bits):
    monkeypatch.setenv("LOOKTWICE_GREY_BITS", "16")
    assert Settings.from_environment().grey_bits == 16
    monkeypatch.setenv("LOOKTWICE_GREY_BITS", bits)
    with pytest.raises(SettingsError, match="GREY_BITS must be the sensor's 8 to 16 bits"):
        Settings.from_environment()
