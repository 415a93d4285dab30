"""What the launcher makes of vLLM's flags."""

import pytest

from looktwice_server.errors import SettingsError
from looktwice_server.launch import CHECKOUT_MODELS, CPU_CACHE_BYTES, vllm_arguments

NANO = str(CHECKOUT_MODELS / "nano")


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
