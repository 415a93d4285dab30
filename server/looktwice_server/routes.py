"""HTTP routes: vLLM's endpoint plugin with inspections in chat and inspections alone.

Only routes on the list below are served. Every other one of vLLM's that can carry an image would
pass the checks by; it answers 404.
"""

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from itertools import starmap
from typing import Any
from weakref import WeakSet

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.responses import Response
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import GenerationError, RetryableRequestError

from looktwice_adapters.checkpoint import file_hash
from looktwice_server import metrics
from looktwice_server.body import CheckedRoute
from looktwice_server.chat import ChatRequest, InspectingChat, begun, with_inspections
from looktwice_server.errors import (
    RequestError,
    UnknownModel,
    http_error_response,
    naming,
    request_error_response,
)
from looktwice_server.inspections import Crops, Finding, Inspections, together
from looktwice_server.reference_store import ReferenceStore, checked_name
from looktwice_server.references import References, in_base64
from looktwice_server.schemas import (
    Inspection,
    InspectionList,
    InspectionsRequest,
    Reference,
    ReferenceDeleted,
    ReferenceList,
    ReferenceRequest,
    ReferenceVersion,
)
from looktwice_server.settings import Settings, served
from looktwice_server.weights import calibration_hash, judging_file

SERVED = frozenset(
    {
        "/health", "/load", "/ping", "/version", "/metrics", "/v1/models",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json",
    }
)  # fmt: skip
TAG = "LookTwice"  # marks our routes in the OpenAPI
GONE = 499  # as others log it: the client hung up, whom no answer reaches

router = APIRouter(route_class=CheckedRoute, tags=[TAG])


def until_gone(
    handler: Callable[..., Awaitable[object]],
) -> Callable[..., Awaitable[object]]:
    """Cancel a handler whose client hangs up, and answer `GONE`: no failure of this server."""

    @wraps(handler)
    async def answered(*args: object, **kwargs: object) -> object:
        answer = await cancelled(*args, **kwargs)
        return Response(status_code=GONE) if answer is None else answer

    cancelled = with_cancellation(handler)
    return answered


@router.post("/v1/chat/completions")
@until_gone
@load_aware_call
async def create_chat_completion(request: ChatRequest, raw_request: Request) -> Response:
    """OpenAI's chat completion, with `inspections` of its images."""
    state = raw_request.app.state
    try:
        answer = await state.looktwice.chat.create_chat_completion(request, raw_request)
    except RetryableRequestError:
        raise
    except GenerationError as error:
        if request.extract_structured_outputs() is None:
            raise
        raise RequestError(
            "no answer of this model fits the response_format or structured_outputs; simplify it",
            param="response_format",
        ) from error
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    answered = await state.looktwice.answers(
        "chat",
        request._inspected.findings,
        request._inspected.reference,
        with_map=request.inspection.map,
    )
    inspections = [inspection.model_dump() for inspection in answered]
    if isinstance(answer, ChatCompletionResponse):
        return JSONResponse(answer.model_dump() | {"inspections": inspections})
    keep_alive = float(getattr(state.args, "sse_keep_alive_interval", 0))
    if keep_alive <= 0:  # with it, the connection must not wait for the first token
        answer = await begun(answer)
    stream = with_inspections(answer, request.n or 1, inspections)
    return StreamingResponse(
        with_sse_keep_alive(stream, keep_alive), media_type="text/event-stream"
    )


@router.post("/v1/inspections")
@until_gone
@load_aware_call
async def create_inspections(request: InspectionsRequest, raw_request: Request) -> InspectionList:
    """Inspect pictures without the language model."""
    looktwice: LookTwice = raw_request.app.state.looktwice
    looktwice.check_model(request.model)
    if len(request.images) > looktwice.settings.max_images:
        raise RequestError(
            f"at most {looktwice.settings.max_images} images a request, "
            f"got {len(request.images)}; send fewer",
            param="images",
        )
    reference = await looktwice.references.resolve(request.reference)
    findings = dict(enumerate(await looktwice.find(request.images, reference)))
    data = await looktwice.answers("inspections", findings, reference, with_map=request.map)
    return InspectionList(model=looktwice.model_name, data=data)


@router.put("/v1/references/{name}")
@until_gone
@load_aware_call
async def put_reference(name: str, request: ReferenceRequest, raw_request: Request) -> Reference:
    """Make a reference of good pictures, or replace the one of that name."""
    looktwice: LookTwice = raw_request.app.state.looktwice
    return await looktwice.references.add(checked_name(name), request, looktwice.crops)


@router.get("/v1/references")
async def list_references(raw_request: Request) -> ReferenceList:
    """All references, by name; `problem` says which cannot be used, and why."""
    looktwice: LookTwice = raw_request.app.state.looktwice
    cards = await asyncio.to_thread(looktwice.references.cards)
    return ReferenceList(model=looktwice.model_name, data=cards)


@router.get("/v1/references/{name}")
async def get_reference(name: str, raw_request: Request, thumbnails: bool = False) -> Reference:
    """One reference; `?thumbnails=true` brings its pictures, small."""
    references: References = raw_request.app.state.looktwice.references
    card = await asyncio.to_thread(references.card, name)
    if thumbnails:
        kept = await asyncio.to_thread(references.store.thumbnails, name, card.version)
        card = card.model_copy(update={"thumbnails": in_base64(kept)})
    return card


@router.delete("/v1/references/{name}")
async def delete_reference(name: str, raw_request: Request) -> ReferenceDeleted:
    """Delete a reference; requests under way with it end with it."""
    await asyncio.to_thread(raw_request.app.state.looktwice.references.store.remove, name)
    return ReferenceDeleted(name=name)


class LookTwice:
    """What the routes share in one API process."""

    def __init__(self, engine_client: EngineClient, chat: Any, settings: Settings) -> None:
        """Wrap vLLM's chat handler and open the way to the workers."""
        hf_config = engine_client.vllm_config.model_config.hf_config
        weights, calibration = judging_file(hf_config)

        async def rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
            return await engine_client.collective_rpc(method, args=args)

        inspections = Inspections(rpc, hf_config, calibration, settings)
        self.settings = settings
        self._scored: WeakSet[Finding] = WeakSet()  # those whose score is in the metrics
        self.expert = file_hash(weights)
        self.references = References(
            ReferenceStore(
                settings.references,
                settings.max_references,
                settings.nameless_references_mb * 2**20,
            ),
            inspections,
            self.expert,
            calibration_hash(hf_config),
            settings,
            calibration.normal_scores,
        )
        self.chat = InspectingChat.around(chat, inspections, self.references, settings)

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.chat.models.model_name()

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel for another model's name."""
        if name is not None and not self.chat.models.is_base_model(name):
            raise UnknownModel(
                f"the model {name!r} is not served here, {self.model_name!r} is", param="model"
            )

    async def crops(self, url: str) -> Crops:
        """The crops of the picture behind a URL or data URI.

        Raises:
            RequestError: it cannot be had.
        """
        request = ChatRequest(
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
            ]
        )
        _, [engine_input] = await self.chat.render(request)
        [crops] = self.chat.crops(engine_input)
        return crops

    async def find(
        self, urls: Sequence[str], reference: ReferenceVersion | None
    ) -> Sequence[Finding]:
        """Inspect the pictures behind a request's URLs or data URIs.

        Raises:
            RequestError: one cannot be had or inspected; the message names its index.
        """

        async def read(index: int, url: str) -> Crops:
            with naming("images", index):
                crops = await self.crops(url)
            return crops if reference is None else crops.compared(reference.version)

        async def inspect(index: int, crops: Crops) -> Finding:
            with naming("images", index):
                return await self.chat.inspections.inspect(crops)

        with self.chat.one_budget():  # not while they are inspected: others may decode
            pictures = await together(starmap(read, enumerate(urls)))
        return await together(starmap(inspect, enumerate(pictures)))

    async def answers(
        self,
        route: str,
        findings: Mapping[int, Finding],
        reference: ReferenceVersion | None,
        *,
        with_map: bool,
    ) -> list[Inspection]:
        """The inspections that a request gets, counted; maps are packed beside the event loop."""
        product = "" if reference is None else reference.name or metrics.CONVERSATION
        for finding in findings.values():
            metrics.INSPECTIONS.labels(route, finding.verdict).inc()
            if finding not in self._scored:  # a part's score, however often it is asked about
                self._scored.add(finding)
                metrics.SCORES.labels(product).observe(finding.score)

        def packed() -> list[Inspection]:
            return [
                finding.inspection(
                    image=image,
                    model=self.model_name,
                    expert=self.expert,
                    reference=reference,
                    with_map=with_map,
                )
                for image, finding in findings.items()
            ]

        return await asyncio.to_thread(packed) if with_map else packed()


class InspectionRoutes:
    """The endpoint plugin that vLLM loads by its name in VLLM_PLUGINS."""

    name = "looktwice_routes"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Serve our routes and those of vLLM's that carry no image."""
        app.router.routes[:] = [
            route for route in app.router.routes if getattr(route, "path", None) in SERVED
        ]
        app.include_router(router)
        app.add_exception_handler(RequestError, request_error_response)
        app.add_exception_handler(HTTPException, http_error_response)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Prepare what the routes share."""
        assert engine_client is not None  # given for every task but `render`
        state.looktwice = LookTwice(engine_client, state.openai_serving_chat, served())
        state.cleaning = asyncio.create_task(state.looktwice.references.keep_clean())
        # Batches from files (vLLM's run-batch) ask the handler in the state.
        state.openai_serving_chat = state.looktwice.chat
