"""The web application: a page for people, OpenAI's completions API for programs.

    uvicorn.run(app(engine, hosts={"127.0.0.1", "localhost"}), host="127.0.0.1", port=8000)

Bound to this machine unless told otherwise. Requests from other web pages are refused: they cannot send JSON here without asking first, and
an address that merely points here has another Host.
"""

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from anew.errors import UserError
from anew.serve import openai_api as completions
from anew.serve import schemas as wanted
from anew.serve.engine import Busy, Engine, Token

log = logging.getLogger("anew")
T = TypeVar("T")
STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
LOOK_SECONDS = 0.25  # between looks whether the visitor is still there


def app(engine: Engine, hosts: set[str]) -> Any:
    """The ASGI application. `hosts`: names that a request may call this machine by; empty: any."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    born = int(time.time())

    def page(name: str, kind: str) -> Response:
        return Response((STATIC / name).read_bytes(), media_type=kind)

    for path, (name, kind) in FILES.items():
        api.add_api_route(path, partial(page, name, kind), methods=["GET"])

    @api.get("/v1/models")
    def models() -> JSONResponse:
        listed = [
            {"id": name, "object": "model", "created": born, "owned_by": "anew"}
            for name in engine.models
        ]
        return JSONResponse({"object": "list", "data": listed})

    @api.get("/v1/models/{name:path}")
    def model(name: str) -> JSONResponse:
        return JSONResponse(
            {"id": engine.find(name).name, "object": "model", "created": born, "owned_by": "anew"}
        )

    @api.get("/api/models")
    def shapes() -> JSONResponse:
        return JSONResponse(
            [
                {"name": s.name, "positions": s.model.config.n_positions}
                for s in engine.models.values()
            ]
        )

    @api.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = wanted.completion(engine, wanted.read(await _body(request)))
        facts = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.served.name,
        }
        place = engine.take_place()
        stop = threading.Event()
        writing = completions.chunks(engine, place, asked, stop)
        if asked.stream:
            lines = (json.dumps(facts | chunk) async for chunk in _thread(request, writing, stop))
            return StreamingResponse(_events(lines, end="[DONE]"), media_type="text/event-stream")
        return JSONResponse(
            facts
            | completions.joined([chunk async for chunk in _thread(request, writing, stop)], asked)
        )

    @api.post("/api/write")
    async def write(request: Request) -> Response:
        asked = wanted.playground(engine, wanted.read(await _body(request)))
        place, stop = engine.take_place(), threading.Event()
        tokens = engine.write(place, asked.served, asked.prompts, asked.rules, stop)

        async def lines() -> AsyncIterator[str]:
            yield json.dumps({"prompt_ids": asked.prompts[0]})
            async for _, token in _thread(request, tokens, stop):
                yield json.dumps(_shown(asked, token))

        return StreamingResponse(_events(lines()), media_type="text/event-stream")

    @api.exception_handler(UserError)
    async def wrong(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error))

    @api.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> JSONResponse:
        return _error(
            429, "as many requests wait as may wait; try again in a moment.", {"retry-after": "2"}
        )

    @api.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    return Guard(api, hosts)


class Guard:
    """Before everything: who may ask, and how much they may send."""

    def __init__(self, inner: Any, hosts: set[str]) -> None:
        self.inner, self.hosts = inner, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope["method"], headers)

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                (
                    out["content-security-policy"],
                    out["x-content-type-options"],
                    out["referrer-policy"],
                ) = POLICY, "nosniff", "no-referrer"
                out["cache-control"] = "no-store"
            await send(message)

        await (refused or self.inner)(scope, receive, guarded)

    def _refused(self, method: str, headers: Headers) -> Any:
        host = (
            headers.get("host", "").rsplit(":", 1)[0]
            if not headers.get("host", "").endswith("]")
            else headers["host"]
        )
        if self.hosts and host.strip("[]").lower() not in self.hosts:
            return _error(403, "this server answers to its own address only.")
        if (
            method == "POST"
            and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json"
        ):
            return _error(415, "send JSON, with the content type application/json.")
        return None


async def _body(request: Request) -> bytes:
    """The body, as far as it may be long."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > wanted.MOST_BYTES:
            break
    return body


async def _thread(request: Request, items: Iterator[T], stop: threading.Event) -> AsyncIterator[T]:
    """What an iterator of the engine yields in a thread of its own. A visitor who leaves sets `stop`, which ends it at the next token."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()
    over = object()

    def work() -> None:
        last: Any = over
        try:
            for item in items:
                loop.call_soon_threadsafe(queue.put_nowait, item)
        except Exception as error:  # noqa: BLE001 (it is raised where it is waited for)
            last = error
        loop.call_soon_threadsafe(queue.put_nowait, last)

    thread = loop.run_in_executor(None, work)
    looked = loop.time()
    try:
        while True:
            if loop.time() - looked > LOOK_SECONDS:
                if await request.is_disconnected():
                    return
                looked = loop.time()
            try:
                item = await asyncio.wait_for(queue.get(), LOOK_SECONDS)
            except TimeoutError:
                continue
            if item is over:
                return
            if isinstance(item, Exception):
                log.error(f"a text could not be written: {item}")
                raise item
            yield item
    finally:
        stop.set()
        await asyncio.shield(thread)


async def _events(lines: AsyncIterator[str], end: str = "") -> AsyncIterator[str]:
    """Server-sent events; an error is one of them, as headers are gone by then."""
    try:
        async for line in lines:
            yield f"data: {line}\n\n"
    except (UserError, RuntimeError) as error:
        yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
    if end:
        yield f"data: {end}\n\n"


def _shown(asked: wanted.Wanted, token: Token) -> dict[str, Any]:
    """A token for the page."""
    tokenizer = asked.served.tokenizer
    others = [
        {"id": i, "label": tokenizer.decode([i]), "log_p": log_p} for i, log_p in token.alternatives
    ]
    ended = token.id == tokenizer.end_of_text
    return {
        "id": token.id,
        "text": token.text,
        "log_p": token.log_p,
        "end": ended,
        "alternatives": others,
    }


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = message.encode("utf-8", "backslashreplace").decode(
        "utf-8"
    )  # what was sent may hold half a surrogate pair, and is quoted
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": None}}, status, headers
    )
