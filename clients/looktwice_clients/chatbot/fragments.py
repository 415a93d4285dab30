"""Inspections, history and products as HTML that screen readers read: real tables, words, no colour
alone. Every text that comes from elsewhere is escaped.
"""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from looktwice_clients.chatbot.history import PAGE, Entry
from looktwice_clients.chatbot.tables import InspectionRow
from looktwice_clients.chatbot.wording import LANGUAGES, Wording, wording
from looktwice_clients.references import Reference


def heading(words: Wording, operator: str) -> str:
    """The page's head: its title, the other languages, and the way out where one logged in."""
    here = {words.language: ' aria-current="page"'}
    links = "".join(
        f'<li><a href="/{name}/" lang="{name}" hreflang="{name}"{here.get(name, "")}>'
        f"{escape(wording(name)('language'))}</a></li>"
        for name in LANGUAGES
    )
    out = f'<a href="/logout">{escape(words("sign_out"))} ({escape(operator)})</a>'
    return (
        f"<header><h1>{escape(words('title'))}</h1>"
        f'<nav aria-label="{escape(words("languages"))}"><ul>{links}</ul></nav>'
        f"{out if operator else ''}</header>"
    )


def notice(text: str, problem: bool = False) -> str:
    """One line for the operator; a problem is spoken at once, wherever it stands."""
    kind = 'class="notice problem" role="alert"' if problem else 'class="notice"'
    return f"<p {kind}>{escape(text)}</p>"


def result(words: Wording, row: InspectionRow) -> str:
    """Verdict, score against threshold, and the regions, as a section."""
    facts = [(words("result.severity"), words.word("severity", row.severity))]
    if row.product is not None:
        facts.append((words("result.product"), row.product))
    if row.p_value is not None:
        facts.append((words("result.p_value"), f"{row.p_value:.3f}"))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts)
    undecided = f"<p>{escape(words('result.undecided'))}</p>"
    return (
        f'<section class="result"><h2>{escape(words("result.heading"))}</h2>'
        f'<p class="verdict {escape(row.verdict)}">'
        f"{escape(words.word('verdict', row.verdict))}</p>"
        f"{undecided if row.verdict == 'undecided' else ''}"
        f"{_scale(words, row)}<dl>{listed}</dl>{regions(words, row)}</section>"
    )


def _scale(words: Wording, row: InspectionRow) -> str:
    """The score on a line from 0 to 1, with the threshold marked on it."""
    said = words("result.score_of", score=f"{row.score:.3f}", threshold=f"{row.threshold:.2f}")
    return (
        f'<div class="scale" role="img" aria-label="{escape(said)}">'
        f'<span class="score" style="width:{100 * min(1, max(0, row.score)):.1f}%"></span>'
        f'<span class="threshold" style="left:{100 * min(1, max(0, row.threshold)):.1f}%"></span>'
        f'</div><p class="scale-words" aria-hidden="true">{escape(said)}</p>'
    )


def regions(words: Wording, row: InspectionRow) -> str:
    """The regions as a table, or the sentence that there are none."""
    if not row.regions:
        return f"<p>{escape(words('result.no_regions'))}</p>"
    names = ("number", "place", "region_score", "area", "box")
    lines = [
        (
            str(number),
            words.word("position", region["position"]),
            f"{region['score']:.2f}",
            f"{100 * region['area']:.1f}\N{NO-BREAK SPACE}%",
            _extent(region["box"]),
        )
        for number, region in enumerate(row.regions, 1)
    ]
    return table(words("result.regions"), [words(f"result.{name}") for name in names], lines)


def _extent(box: Sequence[float]) -> str:
    """A box in words that break into lines nowhere but between across and down."""
    x0, y0, x1, y1 = (f"{corner:.0f}" for corner in box)
    spans = f"x {x0}-{x1}", f"y {y0}-{y1}"
    unbroken = {ord(" "): "\N{NO-BREAK SPACE}", ord("-"): "\N{NON-BREAKING HYPHEN}"}
    return ", ".join(span.translate(unbroken) for span in spans)


def table(caption: str, names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table with a caption, names of its columns, and each line's first field as its name."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(field)}</td>" for field in rest)
        + "</tr>"
        for first, *rest in lines
    )
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def regions_in_words(words: Wording, rows: Sequence[Any]) -> str:
    """How many regions, such as "Suspicious regions: 2"."""
    if not rows:
        return words("result.no_regions")
    return words("result.count_regions", count=len(rows))


def history(words: Wording, entries: Sequence[Entry], total: int, number: int) -> str:
    """One page of the history, an article an inspection."""
    if not entries:
        return notice(words("history.empty"))
    first = number * PAGE + 1
    shown = words("history.page", first=first, last=first + len(entries) - 1, total=total)
    return f"<p>{escape(shown)}</p>" + "".join(_article(words, entry) for entry in entries)


def _article(words: Wording, entry: Entry) -> str:
    row = entry.inspection
    facts = [f"{words('result.score')} {row.score:.3f}", regions_in_words(words, row.regions)]
    facts += [row.product] if row.product else []
    time = words("history.utc", time=row.created.strftime("%Y-%m-%d %H:%M:%S"))
    return (
        f'<article class="past"><a href="/history/{row.id}.jpg" target="_blank">'
        f'<img loading="lazy" src="/history/{row.id}.jpg" width="160" '
        f'alt="{escape(words("history.picture", file=row.file_name))}"></a><div>'
        f"<h2>{escape(row.file_name)}</h2>"
        f'<p><time datetime="{row.created.isoformat()}">{escape(time)}</time></p>'
        f'<p><strong class="verdict {escape(row.verdict)}">'
        f"{escape(words.word('verdict', row.verdict))}</strong> "
        f"{escape(' · '.join(facts))}</p>"
        f"<p>{_said(words, entry)}</p>"
        f"<details><summary>{escape(words('history.details'))}</summary>"
        f"{_scale(words, row)}{regions(words, row)}</details></div></article>"
    )


def _said(words: Wording, entry: Entry) -> str:
    feedback = entry.feedback
    if feedback is None:
        return escape(words("history.no_feedback"))
    opinion = words("feedback.right" if feedback.right else "feedback.wrong")
    return escape(f"{opinion}: {feedback.word}" if feedback.word else opinion)


def products(words: Wording, known: Sequence[Reference]) -> str:
    """The products that the server knows, as a table."""
    if not known:
        return notice(words("products.none"))
    names = ("inspect.product", "products.images", "products.asked_rate", "products.promised_rate")
    lines = [
        (one.name, str(one.images), percent(one.false_alarm_rate), percent(one.promised_rate))
        for one in known
    ]
    return table(words("products.known"), [words(name) for name in names], lines)


def percent(rate: float) -> str:
    """A rate in [0, 1] as a percentage."""
    return f"{100 * rate:.1f} %"
