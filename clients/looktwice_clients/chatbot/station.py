"""What the page's buttons do: one operator's session in, the page's next state out.

Nothing here raises: whatever goes wrong becomes a sentence on the page.
"""

import asyncio
import io
import logging
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gradio as gr
import openai
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from looktwice_clients.chatbot import fragments
from looktwice_clients.chatbot.history import PAGE, History
from looktwice_clients.chatbot.tables import FeedbackRow, InspectionRow, new_id, now
from looktwice_clients.chatbot.wording import Wording
from looktwice_clients.conversation import AsyncConversation
from looktwice_clients.errors import DatabaseError, ImageError, LookTwiceError, one_line, printable
from looktwice_clients.images import to_wire
from looktwice_clients.inspector import AsyncInspector
from looktwice_clients.overlay import OverlayStyle, draw_overlay
from looktwice_clients.references import AsyncReferences, Reference, with_files
from looktwice_clients.schemas import Inspection

if TYPE_CHECKING:
    from starlette.requests import Request as StarletteRequest

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""An answer's longest."""

LEARNING_SECONDS = 600.0
"""How long the server may take to learn a product from many pictures."""

LONGEST_TEXT = 2000
"""Characters of a question or of an operator's word."""

PRODUCT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What the server takes for a reference's name."""

OVERLAY_QUALITY = 85
"""Of the JPEG that the history keeps."""

OVERLAY_STYLE = OverlayStyle(longest=1280)


@dataclass
class Session:
    """What one open page remembers: the last inspection, and the conversation about it."""

    row: InspectionRow
    picture: str
    """As a data URI."""
    conversation: AsyncConversation
    talk: list[dict[str, str]] = field(default_factory=list)
    """The conversation as the page shows it."""


class Station:
    """The buttons of the page in one language; nothing in it belongs to one operator."""

    def __init__(self, inspector: AsyncInspector, history: History, words: Wording) -> None:
        """Ask `inspector`, keep in `history`, speak in `words`."""
        self.inspector = inspector
        self.history = history
        self.words = words

    async def heading(self, request: gr.Request) -> str:
        """The page's head, with the name of who logged in."""
        return fragments.heading(self.words, _visitor(request)["operator"])

    async def inspect(
        self,
        picture: str | None,
        product: str | None,
        before: Session | None,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Outputs: notice, overlay, result, session, chat; feedback's opinion, word and notice.

        What is still being written about the picture `before` ends.
        """
        nothing = [gr.skip()] * 7
        if not picture:
            yield self.problem(self.words("inspect.no_picture")), *nothing
            return
        await self.forget(before)
        cleared: list[Any] = [None, "", None, [], None, "", ""]
        yield fragments.notice(self.words("inspect.running")), *cleared
        try:
            overlay, session = await self._look(picture, product or None, request)
        except (LookTwiceError, openai.OpenAIError, OSError) as error:  # the disk may be full
            yield self.problem(self.explain(error)), *cleared
            return
        verdict = self.words.word("verdict", session.row.verdict)
        regions = fragments.regions_in_words(self.words, session.row.regions)
        alt = self.words("result.overlay_alt", verdict=verdict, regions=regions)
        shown = gr.Image(**overlay, alt_text=alt)
        done = fragments.notice(self.words("inspect.done", verdict=verdict))
        yield done, shown, fragments.result(self.words, session.row), session, *cleared[3:]
        yield done + await self.keep("inspect", session.row), *nothing

    async def _look(
        self, picture: str, product: str | None, request: gr.Request
    ) -> tuple[dict[str, Any], Session]:
        """Have a picture inspected: its overlay on the page, and what the page remembers of it."""
        content = await asyncio.to_thread(uploaded, picture)
        inspection = await self.inspector.inspect(content, product)
        overlay, jpeg = await asyncio.to_thread(_drawn, content, inspection)
        row = _row(inspection, Path(picture).name, jpeg, request)
        return overlay, Session(row, content, self._conversation(row, content))

    async def ask(self, question: str, session: Session | None) -> AsyncIterator[tuple[Any, ...]]:
        """Outputs: notice, chat, question; the answer grows while it is written."""
        skip = gr.skip()
        question = printable(question.strip(), keep="\n\t")[:LONGEST_TEXT]
        if session is None:
            yield self.problem(self.words("chat.empty")), skip, skip
            return
        if not question:
            # In the middle of a talk it is the second click of two: nothing to complain of.
            empty = skip if session.talk else self.problem(self.words("chat.no_question"))
            yield empty, skip, skip
            return
        answer = {"role": "assistant", "content": ""}
        talk = [*session.talk, {"role": "user", "content": question}, answer]
        conversation = session.conversation
        yield "", talk, ""
        sorry = ""
        try:
            async for piece in await conversation.stream(question):
                if session.conversation is not conversation:
                    break
                answer["content"] += printable(piece, keep="\n\t")
                yield "", talk, skip
        except (LookTwiceError, openai.OpenAIError) as error:
            sorry = self.words("chat.stopped", detail=self.explain(error))
            if session.row.product is not None and _is_unknown_reference(error):
                sorry = self.words("chat.removed", product=session.row.product)
        if session.conversation is not conversation:  # cleared meanwhile, or the next picture came
            yield skip, [], skip  # Gradio shows the last step of an event once more when it ends
        elif sorry:
            yield self.problem(sorry), session.talk, question
        else:
            session.talk = talk
            yield self._agreement(session), skip, skip

    def _agreement(self, session: Session) -> str:
        """The notice where the last answer's facts are not those of the page; else "".

        The server inspects with every question, and the product may have been replaced meanwhile.
        """
        row, now_found = session.row, session.conversation.inspection
        if now_found is None or (row.verdict, row.product_version) == _judged(now_found):
            return ""
        verdict = self.words.word("verdict", now_found.verdict)
        return self.problem(self.words("chat.changed", verdict=verdict))

    async def forget(self, session: Session | None) -> tuple[str, list[dict[str, str]]]:
        """Start a new conversation about the same picture. Outputs: notice, chat."""
        if session is not None:
            session.conversation = self._conversation(session.row, session.picture)
            session.talk = []
        return "", []

    def _conversation(self, row: InspectionRow, picture: str) -> AsyncConversation:
        return self.inspector.chat(picture, row.product, max_tokens=MAX_TOKENS)

    async def feedback(self, opinion: str | None, word: str, session: Session | None) -> str:
        """The notice; `opinion` is "right" or "wrong"."""
        if session is None:
            return self.problem(self.words("feedback.nothing"))
        if opinion not in ("right", "wrong"):
            return self.problem(self.words("feedback.choose"))
        feedback = FeedbackRow(
            id=new_id(),
            inspection_id=session.row.id,
            created=now(),
            operator=session.row.operator,
            right=opinion == "right",
            word=printable(word.strip(), keep="\n\t")[:LONGEST_TEXT],
        )
        trouble = await self.keep("feedback", session.row, feedback)
        return trouble or fragments.notice(self.words("feedback.thanks"))

    async def keep(self, what: str, row: InspectionRow, feedback: FeedbackRow | None = None) -> str:
        """Save; "" or the notice of what is wrong. `what` is the part of the page that says it."""
        try:
            if await asyncio.to_thread(self.history.save, row, feedback):
                return ""
            return self.problem(self.words(f"{what}.waits"))
        except DatabaseError as error:
            log.error("cannot be saved anywhere: %s", error)
            return self.problem(self.words(f"{what}.not_saved", detail=str(error)))

    async def past(self, number: int, request: gr.Request) -> tuple[Any, ...]:
        """Outputs: page of the history, its number, button to newer ones, button to older ones."""
        owner = _visitor(request)["owner"]
        try:
            entries, total = await asyncio.to_thread(self.history.page, owner, number)
            waiting = await asyncio.to_thread(self.history.waiting)
        except DatabaseError:
            away = self.problem(self.words("history.away"))
            return away, number, gr.Button(interactive=False), gr.Button(interactive=False)
        shown = fragments.history(self.words, entries, total, number)
        if waiting:
            shown = self.problem(self.words("history.waiting", count=waiting)) + shown
        newer = gr.Button(interactive=number > 0)
        older = gr.Button(interactive=(number + 1) * PAGE < total)
        return shown, number, newer, older

    async def newer(self, number: int, request: gr.Request) -> tuple[Any, ...]:
        """The page of the history before this one."""
        return await self.past(max(0, number - 1), request)

    async def older(self, number: int, request: gr.Request) -> tuple[Any, ...]:
        """The page of the history after this one."""
        return await self.past(number + 1, request)

    async def newest(self, request: gr.Request) -> tuple[Any, ...]:
        """The first page of the history."""
        return await self.past(0, request)

    async def known(self) -> tuple[Any, ...]:
        """Outputs: choice of products, table of products."""
        try:
            known = await self.inspector.references.list()
        except (LookTwiceError, openai.OpenAIError) as error:
            explained = self.explain(error)
            return gr.Dropdown(info=explained), self.problem(explained)
        choices = [(self.words("inspect.no_product"), "")]
        usable = [one for one in known if one.problem is None]
        choices += [(one.name, one.name) for one in usable]
        problems = (one.problem for one in known if one.problem is not None)
        told = (self.problem(self.words("products.warning", detail=one)) for one in problems)
        listed = fragments.products(self.words, usable)
        hint = self.words("inspect.product_hint")
        return gr.Dropdown(choices=choices, info=hint), "".join([listed, *told])

    async def add(
        self, name: str, pictures: list[str] | None, rate: float, replace: bool
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Outputs: notice, choice of products, table of products."""
        name = name.strip()
        if not PRODUCT_NAME.fullmatch(name):
            yield self.problem(self.words("products.no_name")), gr.skip(), gr.skip()
            return
        if not pictures:
            yield self.problem(self.words("products.no_pictures")), gr.skip(), gr.skip()
            return
        running = self.words("products.running", count=len(pictures))
        yield fragments.notice(running), gr.skip(), gr.skip()
        try:
            known = await self.inspector.references.list()
            if not replace and name in [one.name for one in known]:
                exists = self.words("products.exists", name=name)
                yield self.problem(exists), gr.skip(), gr.skip()
                return
            contents = await asyncio.to_thread(lambda: [uploaded(path) for path in pictures])
            patient = self.inspector.client.with_options(timeout=LEARNING_SECONDS)
            added = await AsyncReferences(patient).add(name, contents, false_alarm_rate=rate)
        except (LookTwiceError, openai.OpenAIError) as error:
            yield self.problem(self.explain(error, pictures)), gr.skip(), gr.skip()
            return
        yield self._added(added, pictures), *await self.known()

    def _added(self, product: Reference, pictures: Sequence[str]) -> str:
        """What the operator should know of a product that was learned of these files."""
        asked, rate = map(fragments.percent, (product.false_alarm_rate, product.promised_rate))
        said = {"name": product.name, "count": product.images, "asked": asked, "rate": rate}
        lines = [fragments.notice(self.words("products.added", **said))]
        if product.promised_rate > product.false_alarm_rate:
            lines.append(self.problem(self.words("products.promised", asked=asked)))
        told = (_with_names(one, pictures) for one in product.warnings)
        warnings = (self.words("products.warning", detail=one) for one in told)
        return "".join([*lines, *map(self.problem, warnings)])

    def problem(self, text: str) -> str:
        """A notice of something that is wrong."""
        return fragments.notice(text, problem=True)

    def explain(self, error: Exception, pictures: Sequence[str] = ()) -> str:
        """What went wrong, in the operator's language; the server's own words stay as they are.

        Args:
            error: what was raised.
            pictures: files of a product, which the server may have named by number.
        """
        log.warning("%s", one_line(error, self.inspector.url))
        kinds: tuple[tuple[type[Exception], str], ...] = (
            (ImageError, "picture"),
            (openai.APITimeoutError, "timeout"),
            (openai.APIConnectionError, "unreachable"),
            (openai.AuthenticationError, "key"),
            (openai.RateLimitError, "busy"),
            (openai.APIStatusError, "refused"),
            (Exception, "other"),
        )
        kind = next(kind for of, kind in kinds if isinstance(error, of))
        if getattr(error, "status_code", None) == HTTPStatus.SERVICE_UNAVAILABLE:
            kind = "busy"
        detail = one_line(error)
        if pictures:
            detail = _with_names(detail, pictures)
        else:  # an inspection has one picture, which needs no address
            detail = detail.removeprefix("images[0]").lstrip(": ")
        if isinstance(error, ImageError) and error.code:
            name = f"{printable(error.name)}: " if isinstance(error, UploadError) else ""
            detail = name + self.words(f"picture.{error.code}")
        return self.words(f"error.{kind}", detail=detail)


class UploadError(ImageError):
    """An uploaded file that is no picture."""

    def __init__(self, error: ImageError, path: Path) -> None:
        """What is wrong with the file at `path`; the text names the file, not the folder."""
        super().__init__(str(error).replace(f"{path.parent}/", ""), error.code)
        self.name = path.name


def uploaded(picture: str) -> str:
    """An uploaded file as a data URI, byte for byte where servers read its format.

    Raises:
        UploadError: it is gone, no picture, or too large.
    """
    path = Path(picture)
    try:
        return to_wire(path)
    except ImageError as error:
        raise UploadError(error, path) from None


def _with_names(said: str, pictures: Sequence[str]) -> str:
    """What the server said of a product, with the names of the files that it means."""
    return with_files(said, {"images": [printable(Path(one).name) for one in pictures]})


def _drawn(picture: str, inspection: Inspection) -> tuple[dict[str, Any], bytes]:
    """The overlay as the page shows it, and as JPEG for the history.

    Its PNG file lies among the uploads, where Gradio serves and removes it. Left to Gradio, it
    would be compressed in the event loop, for which everybody waits. Its place is as high as the
    column's width asks ("cqw") before the browser has it: nothing below moves when it comes.
    """
    overlay = draw_overlay(picture, inspection, OVERLAY_STYLE)
    jpeg = io.BytesIO()
    overlay.save(jpeg, "JPEG", quality=OVERLAY_QUALITY)
    file = save_pil_to_cache(overlay, get_upload_folder(), format="png")
    height = f"calc(100cqw * {overlay.height / overlay.width:.4f})"
    return {"value": file, "height": height}, jpeg.getvalue()


def _visitor(request: gr.Request) -> dict[str, str]:
    """Whose history a request may see, and the name typed at the login, by `Door`."""
    scope = cast("StarletteRequest", request.request).scope
    return {"owner": scope["owner"], "operator": scope["operator"]}


def _judged(inspection: Inspection) -> tuple[str, str | None]:
    """The verdict, and the version of the product that it was found with."""
    reference = inspection.reference
    return inspection.verdict, reference.version if reference else None


def _is_unknown_reference(error: Exception) -> bool:
    """Whether the server knows no reference of the name that it was given."""
    return isinstance(error, openai.NotFoundError) and error.param == "reference"


def _row(
    inspection: Inspection, file_name: str, overlay: bytes, request: gr.Request
) -> InspectionRow:
    """What the history keeps of an inspection."""
    verdict, product_version = _judged(inspection)
    by_score = sorted(inspection.regions, key=lambda region: -region.score)
    return InspectionRow(
        id=new_id(),
        **_visitor(request),
        created=now(),
        file_name=printable(file_name),
        product=inspection.reference.name if inspection.reference else None,
        product_version=product_version,
        verdict=verdict,
        score=inspection.score,
        threshold=inspection.threshold,
        severity=inspection.severity,
        p_value=inspection.p_value,
        regions=[region.model_dump(mode="json") for region in by_score],
        width=inspection.width,
        height=inspection.height,
        model=inspection.model,
        expert=inspection.expert,
        overlay=overlay,
    )
