"""Routes: what is on the list is served, every other one of vLLM's answers 404."""

import asyncio
import re
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
from fastapi import FastAPI, Request
from starlette.routing import BaseRoute
from starlette.types import Message

from looktwice_server import metrics
from looktwice_server.inspections import Finding
from looktwice_server.routes import SERVED, LookTwice, until_gone
from looktwice_server.schemas import ReferenceDeleted, ReferenceVersion
from tests.server.bad_input_table import QUESTION
from tests.server.wire import CHAT, INSPECTIONS, Sent, ask, good_uri, image, user
from tests.serving import Server

OURS = {CHAT, INSPECTIONS, "/v1/references", "/v1/references/{name}"}
# Bodies with which a picture could come in, by the keys of all vLLM's routes.
MESSAGES = [user(image(good_uri()), QUESTION)]
BODY = {
    **{"messages": MESSAGES, "input": MESSAGES, "prompt": "<image>", "images": [good_uri()]},
    **{"max_tokens": 2, "text_1": "a", "text_2": "b", "query": "a", "documents": ["b"]},
}


@pytest.fixture(scope="module")
def vllm_routes() -> list[BaseRoute]:
    """The routes of vLLM's own server, those for developers and for every task too."""
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    app = FastAPI()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app.state.args = args
    tasks = ("generate", "render", "transcription", "realtime", "embed", "classify", "score")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        register_api_routers(args, app, tasks)
    return app.router.routes


def requests_to(route: BaseRoute) -> list[Sent]:
    """One request for each method of a route; websockets are asked in plain HTTP."""
    path = re.sub(r"\{[^}]*\}", "x", route.path)
    methods = (getattr(route, "methods", None) or {"GET"}) - {"HEAD"}
    return [Sent(path, BODY, method=method) for method in sorted(methods)]


def test_every_route_of_vllms_that_is_not_on_the_list_answers_404(
    server: Server, vllm_routes: list[BaseRoute]
) -> None:
    refused = [route for route in vllm_routes if route.path not in SERVED | OURS]
    paths = {route.path for route in refused}
    assert {"/v1/responses", "/v1/messages", "/v1/completions", "/inference/v1/generate"} < paths
    assert {"/v1/chat/completions/batch", "/tokenize", "/collective_rpc"} < paths
    for sent in [sent for route in refused for sent in requests_to(route)]:
        answer = ask(server, sent)
        assert answer.status == 404, sent.path
        assert answer.error["message"].startswith(f"{sent.method} {sent.path[:100]} is not served")


def test_the_servers_own_description_lists_nothing_else(server: Server) -> None:
    described = ask(server, Sent("/openapi.json", method="GET")).data["paths"]
    assert set(described) <= SERVED | OURS
    assert set(described) >= OURS


def test_no_other_route_that_is_served_takes_a_picture(server: Server) -> None:
    described = ask(server, Sent("/openapi.json", method="GET")).data["paths"]
    for path in sorted((SERVED | set(described)) - OURS):
        for method in ("GET", "POST"):
            answer = ask(server, Sent(path, BODY, method=method))
            assert answer.status in (200, 404, 405), path
            assert not isinstance(answer.data, dict) or "choices" not in answer.data, path


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/../v1/responses", "//v1/responses"])
def test_a_path_spelled_otherwise_opens_nothing(server: Server, path: str) -> None:
    assert ask(server, Sent(path, BODY)).status in (307, 404)


def test_a_client_that_hangs_up_is_no_failure_of_the_server() -> None:
    app, began, stopped = FastAPI(), asyncio.Event(), []

    @app.post("/slow")
    @until_gone
    async def slow(raw_request: Request) -> ReferenceDeleted:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(True)
        raise AssertionError

    sent: list[Message] = []

    async def receive() -> Message:
        if not received:
            received.append(True)
            return {"type": "http.request", "body": b"", "more_body": False}
        await began.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    received: list[bool] = []
    scope = {"type": "http", "method": "POST", "path": "/slow", "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    assert stopped == [True]
    assert sent[0]["status"] == 499


def test_a_parts_score_is_counted_once_however_often_it_is_asked_about() -> None:
    """Else questions about a bad part would move the mean that tells a camera's drift."""
    looktwice = object.__new__(LookTwice)
    looktwice._scored, looktwice.expert = WeakSet(), "e"
    looktwice.chat = SimpleNamespace(models=SimpleNamespace(model_name=lambda: "nano"))
    part = ReferenceVersion(
        name="counted", version="v", false_alarm_rate=0.05, promised_rate=0.05, warnings=[]
    )
    grey = np.zeros((2, 2), np.uint8)

    def finding(score: float) -> Finding:
        return Finding(score, "normal", "slightly", grey, (), (2, 2))

    async def run() -> None:
        bad = finding(0.75)
        for with_map in (False, True):
            [answer] = await looktwice.answers("chat", {1: bad}, part, with_map=with_map)
            assert (answer.image, answer.score) == (1, 0.75)
            assert (answer.map is not None) == with_map
        await looktwice.answers("chat", {0: finding(0.25)}, part, with_map=False)

    asyncio.run(run())
    [family] = metrics.SCORES.collect()
    values = {s.name: s.value for s in family.samples if s.labels.get("product") == "counted"}
    assert (values["looktwice_score_count"], values["looktwice_score_sum"]) == (2, 1)
