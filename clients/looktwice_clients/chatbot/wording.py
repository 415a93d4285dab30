"""The page's texts: a language and a key -> words; one file a language in `texts/`."""

import tomllib
from functools import cache
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
LANGUAGES = ("en", "ko", "de")
"""The first is what a browser gets that asks for none of them."""


class Wording:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        """Read the language's file."""
        self.language = language
        self.texts = flat(tomllib.loads((TEXTS / f"{language}.toml").read_text("utf-8")))

    def __call__(self, key: str, **fields: object) -> str:
        """The text under a key such as "inspect.button", its {fields} filled in."""
        return self.texts[key].format(**fields)

    def under(self, table: str) -> dict[str, str]:
        """The texts of one table of the file, such as "gradio"."""
        stem = f"{table}."
        return {
            key.removeprefix(stem): text for key, text in self.texts.items() if key.startswith(stem)
        }

    def word(self, kind: str, word: str) -> str:
        """A word of the wire, such as the verdict "normal"; itself where a newer server says it."""
        return self.texts.get(f"{kind}.{word}", word)


@cache
def wording(language: str) -> Wording:
    """The texts of a language, read once."""
    return Wording(language)


def preferred(accept_language: str) -> str:
    """The language that a browser likes best, by its Accept-Language header.

    Args:
        accept_language: such as "ko-KR,ko;q=0.9,en;q=0.8".
    """
    wishes = []
    for wish in accept_language.split(","):
        name, _, quality = wish.strip().partition(";q=")
        try:
            wishes.append((-float(quality or 1), name.partition("-")[0].lower()))
        except ValueError:
            continue
    by_wish = sorted(wishes, key=lambda wish: wish[0])
    return next((name for _, name in by_wish if name in LANGUAGES), LANGUAGES[0])


def flat(table: dict[str, object], above: str = "") -> dict[str, str]:
    """Nested tables of texts as one, its keys joined by dots."""
    texts: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            texts |= flat(value, f"{above}{key}.")
        else:
            texts[above + key] = str(value)
    return texts
