"""Serving, evaluation and training mean the same folder by nano."""

import pytest

from looktwice_adapters.detector import CheckpointError, shipped_checkpoint
from looktwice_adapters.shipped import CHECKOUT_MODELS, shipped_folder
from looktwice_server.launch import find_model


def test_nano_is_the_named_models_then_the_checkouts_and_never_what_lies_here(
    tmp_path, monkeypatch
):
    for place in ("named", "here/models"):
        folder = tmp_path / place / "nano"
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("LOOKTWICE_MODELS", raising=False)
    assert find_model("nano") == str(shipped_checkpoint()) == str(CHECKOUT_MODELS / "nano")
    monkeypatch.setenv("LOOKTWICE_MODELS", str(tmp_path / "named"))
    assert find_model("nano") == str(shipped_checkpoint()) == str(tmp_path / "named" / "nano")
    monkeypatch.setenv("LOOKTWICE_MODELS", str(tmp_path))
    assert shipped_checkpoint() == CHECKOUT_MODELS / "nano"


def test_where_nano_is_nowhere_the_error_says_where_it_was_sought(monkeypatch, tmp_path):
    monkeypatch.setattr("looktwice_adapters.shipped.CHECKOUT_MODELS", tmp_path)
    monkeypatch.delenv("LOOKTWICE_MODELS", raising=False)
    assert shipped_folder("nano") is None
    with pytest.raises(CheckpointError, match=r"neither under \$LOOKTWICE_MODELS nor"):
        shipped_checkpoint()
