"""Which version a name means, and for which expert."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from looktwice_adapters.threshold import NormalScores
from looktwice_server.errors import ReferenceOutdated, UnknownReference
from looktwice_server.reference_store import ReferenceStore
from looktwice_server.references import References
from looktwice_server.settings import Settings
from looktwice_server.weights import calibration_hash, judging_file
from tests.server.cards import card

NANO = Path(__file__).parents[2] / "models" / "nano"


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    store = ReferenceStore(tmp_path, 9)
    store.name(card("bottle", store.keep(b"bank")))
    return store


def running(store: ReferenceStore, expert: str, calibration: str = "own") -> References:
    return References(store, None, expert, calibration, Settings())  # no worker is asked


def resolve(store: ReferenceStore, expert: str, name: str | None):
    return asyncio.run(running(store, expert).resolve(name))


def test_a_name_means_its_latest_version(store):
    first = resolve(store, "mine", "bottle").version
    store.name(card("bottle", store.keep(b"another")))
    second = resolve(store, "mine", "bottle").version
    assert first != second
    assert store.path(first).exists()
    assert resolve(store, "mine", None) is None


def test_a_reference_of_another_expert_is_refused(store):
    with pytest.raises(ReferenceOutdated, match="made with the expert mine, this server runs new"):
        resolve(store, "new", "bottle")


def test_a_reference_of_another_expert_is_listed_with_its_problem(store):
    here, elsewhere = running(store, "mine"), running(store, "new")
    assert [one.problem for one in here.cards()] == [None]
    assert "made with the expert mine, this server runs new; add it again" in (
        elsewhere.cards()[0].problem
    )
    assert elsewhere.card("bottle") == elsewhere.cards()[0]


def test_a_reference_of_another_calibration_is_refused_and_listed_with_its_problem(store):
    elsewhere = running(store, "mine", "other")
    says = "'bottle' was made with another calibration of the expert than this server's; add it"
    with pytest.raises(ReferenceOutdated, match=says):
        asyncio.run(elsewhere.resolve("bottle"))
    assert says in elsewhere.cards()[0].problem


@pytest.mark.parametrize(
    "change", [{"map_bias": 0.5}, {"map_scale": 2.0}, {"normal_scores": asdict(NormalScores())}]
)
def test_a_changed_calibration_has_another_hash_and_the_weights_keep_theirs(change):
    section = AutoConfig.from_pretrained(NANO).anomaly_expert | {
        "weights": str(NANO / "expert.safetensors"),
        "phrase_token_ids": [[1]] * 3,
    }
    before = SimpleNamespace(anomaly_expert=section)
    changed = section | {"calibration": section["calibration"] | change}
    after = SimpleNamespace(anomaly_expert=changed)
    assert judging_file(before)[0] == judging_file(after)[0]
    assert calibration_hash(before) == calibration_hash(before) != calibration_hash(after)


def test_an_unknown_name_is_said(store):
    with pytest.raises(UnknownReference, match="no reference named 'cup'"):
        resolve(store, "mine", "cup")
