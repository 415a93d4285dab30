"""The page's texts: every language has every text, and every text is used."""

import re
from pathlib import Path
from string import Formatter

import pytest

import looktwice_clients.chatbot
from looktwice_clients.chatbot.wording import LANGUAGES, TEXTS, preferred, wording

SOURCES = Path(looktwice_clients.chatbot.__file__).parent
ENGLISH = wording("en").texts
WORDS_OF_OTHERS = ("verdict.", "severity.", "position.", "gradio.")  # of the wire, of Gradio
BUILT = {  # keys that the code puts together: a stem and its endings
    "error.": ("picture", "timeout", "unreachable", "key", "busy", "refused", "other"),
    "picture.": ("missing", "empty", "not_picture", "svg", "pdf", "heic", "unreadable"),
    "result.": ("number", "place", "region_score", "area", "box"),
    "inspect.": ("waits", "not_saved"),
    "feedback.": ("waits", "not_saved"),
}


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def test_the_folder_of_texts_holds_the_languages_that_are_offered():
    assert {path.stem for path in TEXTS.glob("*.toml")} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_key_with_the_same_fields_and_no_empty_text(language):
    texts = wording(language).texts
    assert texts.keys() == ENGLISH.keys()
    assert [key for key in texts if fields(texts[key]) != fields(ENGLISH[key])] == []
    assert [key for key in texts if not texts[key].strip()] == []


def test_no_text_was_left_in_english():
    shared = {"language", "history.utc"}
    for language in set(LANGUAGES) - {"en"}:
        texts = wording(language).texts
        same = {key for key in texts if texts[key] == ENGLISH[key]} - shared
        assert not same, f"{language}: {same}"


def test_the_code_uses_every_text_and_only_texts_that_exist():
    sources = "\n".join(path.read_text("utf-8") for path in SOURCES.rglob("*.py"))
    named = set(re.findall(r"[\"']((?:[a-z]+\.)?[a-z_]+)[\"']", sources)) & ENGLISH.keys()
    asked = set(re.findall(r"words\(\s*[\"']([a-z._]+)[\"']", sources))
    built = {stem + end for stem, ends in BUILT.items() for end in ends}
    others = {key for key in ENGLISH if key.startswith(WORDS_OF_OTHERS)}
    assert asked <= ENGLISH.keys()
    assert ENGLISH.keys() == named | built | others


def test_a_word_that_only_a_newer_server_says_stays_as_it_is():
    assert wording("de").word("verdict", "anomalous") == "auffällig"
    assert wording("de").word("verdict", "blurred") == "blurred"


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("ko-KR,ko;q=0.9,en-US;q=0.8", "ko"),
        ("fr-FR,de;q=0.7,en;q=0.3", "de"),
        ("en;q=0.5, de;q=0.9", "de"),
        ("fr", "en"),
        ("", "en"),
        (";;;q=x,,", "en"),
    ],
)
def test_a_browser_gets_the_language_that_it_likes_best(header, language):
    assert preferred(header) == language
