"""Expert files: the released format round trip, and what is refused instead of guessed."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from looktwice_adapters.checkpoint import (
    ExpertFileError,
    check_state,
    convert_expert,
    file_hash,
    load_expert,
    read_expert,
    released_config,
)
from looktwice_adapters.expert import AnomalyExpert, ExpertConfig
from looktwice_adapters.towers import TowerConfig
from tests.golden import make_expert_checkpoint

SIZES = ExpertConfig((12, 12), 12, embed_size=5, key_size=4, head_size=3, tower=TowerConfig(grid=3))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AnomalyExpert(SIZES).state_dict()


def convert(*arguments: Path):
    return CliRunner().invoke(convert_expert, [str(argument) for argument in arguments])


def test_converted_file_equals_the_released_one_tensor_by_tensor(tmp_path):
    released = make_expert_checkpoint.checkpoint()
    official, out = tmp_path / "pretrained_expert_7b.pth", tmp_path / "expert.safetensors"
    torch.save(released, official)

    result = convert(official, out)

    assert result.exit_code == 0, result.output
    assert f"{out}: {len(released)} tensors, 4 levels of 1152 channels, 27x27" in result.output
    assert file_hash(out) in result.output
    converted = load_file(out)
    assert converted.keys() == released.keys()
    assert all(torch.equal(converted[name], released[name]) for name in released)


def test_sizes_are_read_off_a_released_file(state, tmp_path):
    config = released_config(state)
    assert config == replace(SIZES, tower=replace(TowerConfig(), grid=3))
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "expert.pth")
    expert = load_expert(tmp_path / "expert.pth")
    assert all(value.dtype == torch.float32 for value in expert.state_dict().values())
    assert not any(value.requires_grad for value in expert.parameters())


def test_half_precision_survives_the_conversion(state, tmp_path):
    half = {name: value.bfloat16() for name, value in state.items()}
    torch.save(half, tmp_path / "expert.pth")
    assert convert(tmp_path / "expert.pth", tmp_path / "expert.safetensors").exit_code == 0
    converted = load_file(tmp_path / "expert.safetensors")
    assert all(torch.equal(converted[name], half[name]) for name in half)
    assert converted["positive_embedding"].dtype == torch.bfloat16


def test_missing_unknown_and_misshapen_tensors_are_named(state):
    check_state(state, SIZES)
    missing = {name: value for name, value in state.items() if name != "q_former.key_proj.bias"}
    with pytest.raises(ExpertFileError, match=r"q_former\.key_proj\.bias is missing$"):
        check_state(missing, SIZES)
    with pytest.raises(ExpertFileError, match=r"extra is unknown$"):
        check_state(state | {"extra": torch.zeros(1)}, SIZES)
    with pytest.raises(ExpertFileError, match=r"positive_embedding is \(1, 6\) instead of \(1, 5"):
        check_state(state | {"positive_embedding": torch.zeros(1, 6)}, SIZES)
    with pytest.raises(ExpertFileError, match=r"\(and 1 more\)"):
        check_state(missing | {"extra": torch.zeros(1)}, SIZES)


class Payload:
    """What an attacker's pickle does when it is loaded as Python objects."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [False, True], ids=["torch", "pickle"])
def test_pickle_with_code_in_it_is_refused_and_not_executed(plain, tmp_path):
    trap, file = tmp_path / "executed", tmp_path / "expert.pth"
    payload = {"positive_embedding": Payload(trap)}
    if plain:
        file.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, file)

    with pytest.raises(ExpertFileError, match="cannot read"):
        load_expert(file)
    result = convert(file, tmp_path / "out.safetensors")

    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot read")
    assert result.output.count("\n") == 1
    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["expert.pth", "expert.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02garbage", b"PK\x03\x04" + bytes(50)])
def test_broken_files_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ExpertFileError, match="cannot read"):
        read_expert(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path, state):
    for name, write in (("expert.pth", torch.save), ("expert.safetensors", save_file)):
        write(state, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ExpertFileError, match="cannot read"):
            read_expert(tmp_path / name)


def test_what_is_no_expert_is_refused(tmp_path):
    with pytest.raises(ExpertFileError, match="no expert file at"):
        read_expert(tmp_path / "nowhere.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ExpertFileError, match="not a dictionary of tensors"):
        read_expert(tmp_path / "list.pth")
    torch.save({"epoch": 3, "state": {}}, tmp_path / "training.pth")
    with pytest.raises(ExpertFileError, match="not a dictionary of tensors"):
        read_expert(tmp_path / "training.pth")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ExpertFileError, match="not an anomaly expert: it has no tensor"):
        load_expert(tmp_path / "other.safetensors")


def test_output_of_another_kind_is_wrong_usage(tmp_path, state):
    torch.save(state, tmp_path / "expert.pth")
    result = convert(tmp_path / "expert.pth", tmp_path / "out.pth")
    assert result.exit_code == 2
    assert "must end in .safetensors" in result.output
