"""The web application: a page for people, and OpenAI's APIs for programs.

    uvicorn.run(app(engine, hosts={"127.0.0.1", "localhost"}), host="127.0.0.1", port=8000)

/docs describes the API. Requests from other web pages are refused: a browser lets them send JSON
only after asking this server, which does not allow it, and a foreign name that points to this
machine is not among `hosts` (DNS rebinding).
"""

import asyncio
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from anew.errors import UserError
from anew.serve.engine import POLL_SECONDS, Busy, Engine
from anew.serve.openai_api import as_chat_answer, as_chat_chunk, chunks, joined
from anew.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    InsideRequest,
    PageRequest,
    error_sentence,
)

log = logging.getLogger("anew")
T = TypeVar("T")

MAX_BODY_BYTES = 256 * 1024
STATIC = Path(__file__).parent / "static"
PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/inside.js": ("inside.js", "text/javascript"),
}
SAME_ORIGIN = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self'; {SAME_ORIGIN}"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# FastAPI's page of the API has inline code and loads the rest from this address.
DOCS_SOURCES = "'unsafe-inline' https://cdn.jsdelivr.net"
DOCS_POLICY = (
    f"default-src 'none'; script-src {DOCS_SOURCES}; style-src {DOCS_SOURCES}; {SAME_ORIGIN}"
)


def app(engine: Engine, hosts: set[str]) -> Any:
    """Return the ASGI application. `hosts`: the names that requests may use; empty: any name."""
    errors: dict[int | str, Any] = {"4XX": {"description": "an error, as OpenAI's API has it"}}
    api = FastAPI(title="anew", redoc_url=None, responses=errors)
    for path, (name, kind) in PAGE_FILES.items():
        respond = partial(_page_file, name, kind)
        api.add_api_route(path, respond, methods=["GET"], include_in_schema=False)
    _add_models(api, engine)
    _add_generation(api, engine)
    _add_error_handlers(api)
    return Guard(api, hosts)


def _page_file(name: str, kind: str) -> Response:
    return FileResponse(STATIC / name, media_type=kind)


def _add_models(api: FastAPI, engine: Engine) -> None:
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "anew"}

    @api.get("/v1/models")
    def models() -> Any:
        """List the models, in OpenAI's form."""
        return {"object": "list", "data": [described(name) for name in engine.models]}

    @api.get("/v1/models/{name:path}")
    def model(name: str) -> Any:
        """Return one model, in OpenAI's form."""
        return described(engine.find(name).name)

    @api.get("/api/models")
    def page_models() -> Any:
        """List the models with their numbers of positions, for the page."""
        return [
            {
                "name": served.name,
                "positions": served.model.config.n_positions,
                "is_chat": served.is_chat,
            }
            for served in engine.models.values()
        ]


def _add_generation(api: FastAPI, engine: Engine) -> None:
    @api.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, in the form of OpenAI's completions API."""
        job = body.job(engine)
        common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.served.name,
        }
        stop = threading.Event()
        parts = chunks(engine, engine.take_place(), job, body, stop)
        arriving = _in_thread(request, parts, stop)
        if body.stream:
            lines = (json.dumps(common | chunk) async for chunk in arriving)
            return _event_stream(lines, end="[DONE]")
        answer = joined([chunk async for chunk in arriving], len(job.prompts))
        return JSONResponse(common | answer)

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, in the form of OpenAI's chat completions API."""
        job, n_left_out = body.job(engine)
        common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": job.served.name,
            "messages_left_out": n_left_out,  # the oldest, which do not fit
        }
        stop = threading.Event()
        parts = chunks(engine, engine.take_place(), job, body, stop)
        arriving = _in_thread(request, parts, stop)
        if body.stream:
            lines = (json.dumps(common | as_chat_chunk(chunk)) async for chunk in arriving)
            return _event_stream(lines, end="[DONE]")
        answer = joined([chunk async for chunk in arriving], len(job.prompts))
        return JSONResponse(common | as_chat_answer(answer))

    @api.post("/api/write")
    async def write(body: PageRequest, request: Request) -> Response:
        """Continue one text or conversation, with alternatives of each token, for the page."""
        # In a thread, because it copies the matrices of parts that are switched off.
        job, n_left_out = await run_in_threadpool(body.job, engine)
        stop = threading.Event()
        tokens = engine.write(engine.take_place(), job, stop)

        async def lines() -> AsyncIterator[str]:
            yield json.dumps({"prompt_ids": job.prompts[0], "messages_left_out": n_left_out})
            async for _, token in _in_thread(request, tokens, stop):
                yield json.dumps(dataclasses.asdict(token))

        return _event_stream(lines())

    @api.post("/api/inside")
    def inside(body: InsideRequest) -> Response:
        """Return attention and next tokens after each block while a text is read, for the page."""
        with engine.take_place():
            return JSONResponse(body.inside(engine))


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, error_sentence(error.errors()))

    @api.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> JSONResponse:
        message = "as many requests wait as may wait; try again in a moment."
        return _error(429, message, {"retry-after": "2"})

    @api.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    # The message may quote half a surrogate pair of the request, which UTF-8 does not have.
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


class Guard:
    """Check who sends a request and how long it is, before the application reads it.

    The headers of every answer tell the browser what its content may load.
    """

    def __init__(self, inner: Any, hosts: set[str]) -> None:
        self.inner = inner
        self.hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request (the interface of ASGI)."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if scope["path"] == "/docs":
                    headers["content-security-policy"] = DOCS_POLICY
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        await (refusal or self.inner)(scope, _limited(receive), send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if not host.endswith("]"):  # an IPv6 address without a port
            host = host.rsplit(":", 1)[0]
        if self.hosts and host.strip("[]").lower() not in self.hosts:
            return _error(403, "this server answers to its own address only.")
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        if method == "POST" and content_type != "application/json":
            return _error(415, "send JSON, with the content type application/json.")
        return None


def _limited(receive: Callable[[], Any]) -> Callable[[], Any]:
    """Return `receive` of ASGI with a limit: a request that is longer is answered with 400."""
    n_bytes = 0

    async def receive_limited() -> Any:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY_BYTES:
            raise HTTPException(400, f"the request has more than {MAX_BODY_BYTES:,} bytes.")
        return message

    return receive_limited


async def _in_thread(
    request: Request, items: Iterator[T], stop: threading.Event
) -> AsyncIterator[T]:
    """Yield the items of an iterator that runs in a thread.

    When the client leaves, `stop` is set, which ends the iterator at the next token.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Any] = asyncio.Queue()
    end = object()

    def work() -> None:
        last: Any = end
        try:
            for item in items:
                loop.call_soon_threadsafe(queue.put_nowait, item)
        except Exception as error:  # noqa: BLE001 (it is raised below)
            last = error
        loop.call_soon_threadsafe(queue.put_nowait, last)

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(POLL_SECONDS)
        stop.set()

    thread = loop.run_in_executor(None, work)
    watcher = asyncio.create_task(watch())
    try:
        while (item := await queue.get()) is not end:
            if isinstance(item, Exception):
                log.error(f"a text could not be generated: {item}")
                raise item
            yield item
    finally:
        stop.set()
        watcher.cancel()
        await asyncio.shield(thread)


def _event_stream(lines: AsyncIterator[str], end: str = "") -> StreamingResponse:
    """Return lines as server-sent events, with `end` as the last one."""

    async def events() -> AsyncIterator[str]:
        try:
            async for line in lines:
                yield f"data: {line}\n\n"
        except (UserError, RuntimeError) as error:  # the status has been sent already
            message = {"message": str(error), "type": "server_error"}
            yield f"data: {json.dumps({'error': message})}\n\n"
        if end:
            yield f"data: {end}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
