import errno
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from looktwice_clients.cli import run
from looktwice_clients.doctor import Finding, models, packages, server


def states(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.subject, finding.state) for finding in findings]


def safetensors(numbers: int) -> bytes:
    """A safetensors file of one float32 vector, written out by hand."""
    entry = {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * numbers)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    config = {"model_type": "llava_onevision", "anomaly_expert": {"weights": "expert.safetensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(5))
    (folder / "expert.safetensors").write_bytes(safetensors(3))
    return folder


def test_a_whole_model_is_ok_with_the_hashes_of_its_files(model: Path) -> None:
    findings = list(models([model]))
    assert states(findings) == [("model small", "ok")] * 2
    for finding, name in zip(findings, ("expert", "model"), strict=True):
        content = (model / f"{name}.safetensors").read_bytes()
        assert finding.detail.endswith(f"sha256 {hashlib.sha256(content).hexdigest()}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (safetensors(5)[:-1], "bytes, its header says"),
        (safetensors(5) + b"x", "bytes, its header says"),
        (b"", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"\x05\0\0\0\0\0\0\0hello", "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
    ],
)
def test_a_damaged_weight_file_is_a_problem(model: Path, content: bytes, words: str) -> None:
    (model / "model.safetensors").write_bytes(content)
    finding = list(models([model]))[1]
    assert finding.state == "problem"
    assert words in finding.detail
    assert finding.remedy


def test_a_missing_expert_and_a_broken_config_are_problems(model: Path) -> None:
    (model / "expert.safetensors").unlink()
    assert states(list(models([model]))) == [("model small", "problem"), ("model small", "ok")]
    for broken in ("{", "[]", "null"):
        (model / "config.json").write_text(broken)
        assert states(list(models([model]))) == [("model small", "problem")]


def test_a_file_that_differs_from_the_published_hash_is_a_problem(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    listing = model / "SHA256SUMS"
    listing.write_text(f"{hashlib.sha256(content).hexdigest()}  model.safetensors\n")
    assert states(list(models([model])))[1] == ("model small", "ok")
    listing.write_text(f"{'0' * 64}  model.safetensors\n")
    assert states(list(models([model])))[1] == ("model small", "problem")


@pytest.mark.parametrize("damaged", [b"\n0123abcd\n", b"\xff\n"])
def test_a_damaged_list_of_hashes_is_a_problem_and_the_weights_are_looked_at(
    model: Path, damaged: bytes
) -> None:
    (model / "SHA256SUMS").write_bytes(damaged)
    first, *weights = models([model])
    assert first.state == "problem"
    assert f"{model}/SHA256SUMS: " in first.detail
    assert states(weights) == [("model small", "ok")] * 2


def test_no_model_is_a_note_for_those_who_only_ask_servers() -> None:
    assert states(list(models([]))) == [("models", "note")]


def test_packages_are_compared_with_the_requirements() -> None:
    requirements = [
        "click>=8.1",
        "openai>=2.0",
        "nothing-of-that-name>=1.0; extra == 'adapters'",
        "pillow>=999; extra == 'train'",
        "pydantic>=2,==1.0.0 ; extra == 'odd'",
        "nothing-for-here==1.0; (sys_platform == 'plan9') and extra == 'adapters'",
    ]
    extras = ["adapters", "odd", "train"]
    found = {finding.subject: finding for finding in packages(requirements, extras)}
    assert {subject: finding.state for subject, finding in found.items()} == {
        "base install": "ok",
        "extra adapters": "note",
        "extra train": "problem",
        "extra odd": "problem",
    }
    assert found["extra adapters"].detail == "not installed: nothing-of-that-name"
    assert found["extra adapters"].remedy == "pip install 'looktwice[adapters]'"
    assert "needs >=999" in found["extra train"].detail


def test_a_missing_base_package_is_a_problem() -> None:
    assert states(list(packages(["nothing-of-that-name>=1.0"], []))) == [
        ("base install", "problem")
    ]


def test_a_running_looktwice_server_is_ok(wire: Any) -> None:
    found = list(server(wire.url))
    assert states(found) == [("server", "ok")]
    assert found[0].detail == f"{wire.url} serves looktwice-test"


def test_a_server_that_wants_a_key_is_a_problem_with_its_remedy(wire: Any) -> None:
    wire.key = "secret"
    found = list(server(wire.url))
    assert states(found) == [("server", "problem")]
    assert found[0].remedy == "set LOOKTWICE_API_KEY"


def test_another_openai_server_is_not_taken_for_looktwice(wire: Any) -> None:
    wire.looktwice = False
    found = list(server(wire.url))
    assert states(found) == [("server", "problem")]
    assert "no /v1/inspections" in found[0].detail


def test_a_wrong_path_on_the_server_is_a_problem(wire: Any) -> None:
    assert states(list(server(wire.url + "/deeper"))) == [("server", "problem")]


def test_a_free_port_is_a_note() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = list(server(f"http://127.0.0.1:{port}/v1"))
    assert states(found) == [("server", "note")]
    assert "looktwice serve" in found[0].remedy


@pytest.mark.parametrize("url", ["ftp://plant/v1", "http://:80/v1", "http://plant:port/v1"])
def test_an_address_that_is_none_is_a_problem(url: str) -> None:
    assert states(list(server(url))) == [("server", "problem")]


def test_a_proxy_before_this_machine_is_a_problem(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    found = list(server(wire.url))
    assert states(found)[0] == ("proxy", "problem")
    assert found[0].remedy == "set NO_PROXY=127.0.0.1"


def test_the_command_prints_one_json_object_and_the_exit_code_of_its_problems(
    wire: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    wire.looktwice = False
    assert run(["doctor", "--json", "--url", wire.url]) == 1
    report = json.loads(capsys.readouterr().out)
    subjects = [finding["subject"] for finding in report["findings"]]
    assert subjects[:2] == ["looktwice", "base install"]
    assert report["problems"] == sum(f["state"] == "problem" for f in report["findings"]) >= 1
    assert run(["doctor", "--url", wire.url]) == 1
    assert "PROBLEM  server" in capsys.readouterr().out


def test_what_cannot_be_read_or_sent_is_one_problem_among_the_findings(
    wire: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def closed(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *how, **more)

    monkeypatch.setattr(Path, "open", closed)
    assert [state for _, state in states(list(models([model])))] == ["ok", "problem"]
    monkeypatch.setenv("LOOKTWICE_API_KEY", "schl\u00fcssel")
    [found] = server(wire.url)
    assert (found.state, found.remedy) == ("problem", "set LOOKTWICE_API_KEY")
