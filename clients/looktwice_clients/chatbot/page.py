"""The page: its parts and which button does what, in one language, as Gradio blocks."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.data_classes import ImageData

from looktwice_clients.chatbot import fragments
from looktwice_clients.chatbot.station import LONGEST_TEXT, Station

CSS = Path(__file__).parent / "page.css"
SESSIONS = 2000
"""Opened pages that are remembered, by language; each takes some 80 kB, and more with a picture."""

FALSE_ALARM_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)

# The language of the page for screen readers, live regions that stay while their text changes, and
# the words of Gradio's own buttons: it knows no language but the browser's, and has most of them in
# English alone. Those of a tab are not there before it is opened.
ON_LOAD = """() => {{
  document.documentElement.lang = "{language}";
  const words = new Map(Object.entries({words}));
  const speak = () => {{
    for (const box of document.querySelectorAll(".block.says:not([role])")) {{
      box.setAttribute("role", "status"); box.setAttribute("aria-live", "polite");
    }}
    for (const part of document.querySelectorAll("button, button *, [role=log]")) {{
      const named = ["aria-label", "title"].map(name => part.getAttributeNode(name));
      for (const said of [...named, ...part.childNodes]) {{
        const ours = words.get(said?.nodeValue?.trim());
        if (ours && said.nodeValue !== ours) said.nodeValue = ours;
      }}
    }}
  }};
  speak();
  new MutationObserver(speak).observe(document.body, {{
    childList: true, subtree: true, characterData: true, attributeFilter: ["aria-label", "title"],
  }});
}}"""


LOUD: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {"show_progress": "hidden", **LOUD}
"""How events run: offered to no other program, with and without a moving bar."""


def as_given(payload: ImageData | None) -> str | None:
    """Where an operator's picture lies, byte for byte as it was given.

    In place of Gradio's own step, which opens it: what is wrong with a picture, the client says in
    better words.
    """
    return payload.path if payload else None


def as_chosen(name: object) -> str | None:
    """The chosen product's name.

    In place of Gradio's own step, which refuses what left the list meanwhile: the server says it in
    better words.
    """
    return name if isinstance(name, str) else None


def theme() -> gr.themes.Base:
    """The machine's own fonts, so that nothing is fetched, and colours of enough contrast."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        color_accent="*primary_700",
        color_accent_soft="*primary_50",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )


def build(station: Station) -> gr.Blocks:
    """The whole page in the station's language."""
    words = station.words
    with gr.Blocks(title=words("title"), analytics_enabled=False) as page:
        head = gr.HTML(fragments.heading(words, ""))  # in its place before its request is answered
        with gr.Tabs():
            with gr.Tab(words("inspect.tab"), id="inspect") as inspect_tab:
                choice = _inspect_tab(station)
            with gr.Tab(words("history.tab"), id="history") as history_tab:
                _history_tab(station, history_tab)
            with gr.Tab(words("products.tab"), id="products"):
                listed = _products_tab(station, choice)
        page.load(
            station.heading,
            None,
            head,
            js=ON_LOAD.format(language=words.language, words=json.dumps(words.under("gradio"))),
            **QUIET,
        )
        # The server may have been away when the page was opened, or know more products by now.
        gr.on([page.load, inspect_tab.select], station.known, None, [choice, listed], **QUIET)
    page.state_session_capacity = SESSIONS
    return page


def _inspect_tab(station: Station) -> gr.Dropdown:
    """Picture, verdict, feedback and conversation; returns the choice of products."""
    words = station.words
    session = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            product = gr.Dropdown(
                [(words("inspect.no_product"), "")],
                value="",
                label=words("inspect.product"),
                info=words("inspect.product_hint"),
                elem_id="product",
            )
            product.preprocess = as_chosen  # type: ignore[method-assign,assignment]
            picture = gr.Image(
                sources=["upload", "clipboard", "webcam"],
                type="filepath",
                label=words("inspect.picture"),
                placeholder=words("inspect.picture_hint"),
                image_mode=None,
                height=320,
                elem_id="picture",
            )
            picture.preprocess = as_given  # type: ignore[method-assign]
            button = gr.Button(words("inspect.button"), variant="primary", elem_id="inspect")
            said = gr.HTML(
                fragments.notice(words("inspect.ready")), elem_id="said", elem_classes="says"
            )
            result = gr.HTML(elem_id="result")
        with gr.Column(min_width=300, elem_id="overlay-column"):
            overlay = gr.Image(
                label=words("result.overlay"),
                show_label=False,  # it would lie on the picture
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
                elem_id="overlay",
            )
    with gr.Row():
        with gr.Column(min_width=300):
            talk = _conversation(station, session)
        with gr.Column(min_width=300):
            feedback = _feedback(station, session)
    outputs = [said, overlay, result, session, talk, *feedback]
    button.click(
        station.inspect, [picture, product, session], outputs, show_progress_on=[result], **LOUD
    )
    return product


def _conversation(station: Station, session: gr.State) -> gr.Chatbot:
    """The talk; what ends an answer early ends it in the station.

    Gradio's `cancels` comes when the event that has it is over, and takes the next question along.
    """
    words = station.words
    gr.HTML(f"<h2>{words('chat.heading')}</h2>")
    talk = gr.Chatbot(
        label=words("chat.heading"),
        render_markdown=False,
        feedback_options=None,
        buttons=["copy"],
        show_label=False,
        allow_tags=False,
        height=280,
        placeholder=words("chat.reset"),
        elem_id="talk",
    )
    question = gr.Textbox(
        label=words("chat.question"),
        placeholder=words("chat.placeholder"),
        max_length=LONGEST_TEXT,
        elem_id="question",
    )
    send = gr.Button(words("chat.send"), elem_id="ask")
    said = gr.HTML(elem_id="chat-said", elem_classes="says")
    gr.on(
        [send.click, question.submit],
        station.ask,
        [question, session],
        [said, talk, question],
        trigger_mode="always_last",  # what is asked while an answer is written comes after it
        **QUIET,
    )
    talk.clear(station.forget, session, [said, talk], **QUIET)
    return talk


def _feedback(station: Station, session: gr.State) -> list[Component]:
    words = station.words
    gr.HTML(f"<h2>{words('feedback.title')}</h2>")
    opinion = gr.Radio(
        [(words("feedback.right"), "right"), (words("feedback.wrong"), "wrong")],
        label=words("feedback.heading"),
        elem_id="opinion",
    )
    word = gr.Textbox(
        label=words("feedback.word"),
        placeholder=words("feedback.word_placeholder"),
        max_length=LONGEST_TEXT,
        elem_id="word",
    )
    send = gr.Button(words("feedback.send"), elem_id="send-feedback")
    said = gr.HTML(elem_id="feedback-said", elem_classes="says")
    send.click(station.feedback, [opinion, word, session], said, **QUIET)
    return [opinion, word, said]


def _history_tab(station: Station, tab: gr.Tab) -> None:
    words = station.words
    number = gr.State(0)
    with gr.Row():
        small: dict[str, Any] = {"size": "md", "scale": 0, "min_width": 100}
        refresh = gr.Button(words("history.refresh"), elem_id="refresh", **small)
        newer = gr.Button(words("history.newer"), interactive=False, elem_id="newer", **small)
        older = gr.Button(words("history.older"), interactive=False, elem_id="older", **small)
    gr.HTML(f'<a class="export" href="/history.csv" download>{words("history.export")}</a>')
    shown = gr.HTML(elem_id="past")
    outputs = [shown, number, newer, older]
    tab.select(station.newest, None, outputs, **QUIET)
    refresh.click(station.newest, None, outputs, **QUIET)
    newer.click(station.newer, number, outputs, **QUIET)
    older.click(station.older, number, outputs, **QUIET)


def _products_tab(station: Station, choice: gr.Dropdown) -> gr.HTML:
    """Add a product from good pictures; returns the table of those known."""
    words = station.words
    gr.HTML(f"<h2>{words('products.heading')}</h2><p>{words('products.explain')}</p>")
    with gr.Row():
        with gr.Column(min_width=300):
            name = gr.Textbox(
                label=words("products.name"),
                info=words("products.name_hint"),
                max_length=64,
                elem_id="product-name",
            )
            pictures = gr.File(
                label=words("products.pictures"),
                file_count="multiple",
                file_types=["image"],
                elem_id="product-pictures",
            )
            rate = gr.Dropdown(
                [(fragments.percent(rate), rate) for rate in FALSE_ALARM_RATES],
                value=0.05,
                label=words("products.rate"),
                elem_id="rate",
            )
            replace = gr.Checkbox(label=words("products.replace"), elem_id="replace")
            button = gr.Button(words("products.button"), variant="primary", elem_id="add-product")
            said = gr.HTML(elem_id="product-said", elem_classes="says")
        with gr.Column(min_width=300):
            listed = gr.HTML(elem_id="products")
    inputs = [name, pictures, rate, replace]
    button.click(station.add, inputs, [said, choice, listed], **LOUD)
    return listed
