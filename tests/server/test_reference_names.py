"""Which version a name means, and for which expert."""

import asyncio
from pathlib import Path

import pytest

from looktwice_server.errors import ReferenceOutdated, UnknownReference
from looktwice_server.reference_store import ReferenceStore
from looktwice_server.references import References
from looktwice_server.settings import Settings
from tests.server.cards import card


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    store = ReferenceStore(tmp_path, 9)
    store.name(card("bottle", store.keep(b"bank")))
    return store


def resolve(store: ReferenceStore, expert: str, name: str | None):
    references = References(store, None, expert, Settings())  # nothing is asked of a worker
    return asyncio.run(references.resolve(name))


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
    here, elsewhere = (References(store, None, expert, Settings()) for expert in ("mine", "new"))
    assert [one.problem for one in here.cards()] == [None]
    assert "made with the expert mine, this server runs new; add it again" in (
        elsewhere.cards()[0].problem
    )
    assert elsewhere.card("bottle") == elsewhere.cards()[0]


def test_an_unknown_name_is_said(store):
    with pytest.raises(UnknownReference, match="no reference named 'cup'"):
        resolve(store, "mine", "cup")
