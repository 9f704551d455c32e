"""The routes of the server. Whatever is wrong with a request is answered with a status and a JSON error."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from flexgen_bench.llm.llm import LLM
from flexgen_bench.requests.answers import Writer
from flexgen_bench.requests.asked import Limits, ParsedRequest, Reader
from flexgen_bench.requests.errors import NOT_FOUND, UNAVAILABLE, RequestError
from flexgen_bench.requests.forms import CHAT, COMPLETIONS, MOST_CHOICES
from flexgen_bench.schedule.sequence_groups import Capacity
from flexgen_bench.serve.answering import Answering
from flexgen_bench.serve.batch_routes import add_batch_routes
from flexgen_bench.serve.batches import Batches
from flexgen_bench.serve.engine_loop import EngineLoop
from flexgen_bench.serve.files import Documents, FileStore
from flexgen_bench.serve.guard import Guard
from flexgen_bench.serve.http_body import json_body
from flexgen_bench.serve.metrics import Metrics
from flexgen_bench.serve.settings import ServeSettings


class LockedReader(Reader):
    """A tokenizer is read by one thread at a time."""

    _lock = threading.Lock()

    def read(self, url: str, body: Any, seed: int = 0) -> ParsedRequest:
        with self._lock:
            return super().read(url, body, seed)


@dataclass(frozen=True)
class Parts:
    """What the routes need."""

    loop: EngineLoop
    reader: Reader
    answering: Answering
    files: FileStore
    batches: Batches
    batch_documents: Documents
    metrics: Metrics


def make_app(llm: LLM, name: str, settings: ServeSettings) -> FastAPI:
    """The server of one model. name: by which requests ask for it. What it needs lives from start-up to shut-down."""
    capacity = Capacity(settings.sequences, settings.prompt_tokens, settings.answer_tokens, settings.kept_tokens)
    # Of more answers than may run and wait nobody could ever be told when to come back.
    choices = min(MOST_CHOICES, settings.sequences + settings.queue)
    limits = Limits(settings.prompt_tokens, settings.answer_tokens, choices)
    reader, writer, metrics = LockedReader(llm.tokenizer, llm.shape, (name,), limits), Writer(llm.tokenizer), Metrics()
    loop = EngineLoop(llm, capacity, metrics.passes.inc)
    files = FileStore(settings.state_dir / "files")
    documents = Documents(settings.state_dir / "batches", "batch")
    batches = Batches(documents, files, loop, reader, writer, settings.sequences)
    answering = Answering(loop, writer, settings, metrics)
    parts = Parts(loop, reader, answering, files, batches, documents, metrics)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as held:
            held.enter_context(loop)
            held.enter_context(batches)
            yield
            # What waits for an end of its own does not hold up the loop of events.
            await run_in_threadpool(held.close)

    app = FastAPI(title="flexgen-bench", lifespan=life, openapi_url=None)
    _add_errors(app)
    app.add_middleware(Guard, keys=settings.keys, metrics=metrics)
    _add_routes(app, parts, name, settings)
    add_batch_routes(app, parts.files, parts.batches, parts.batch_documents, settings)
    return app


def _add_routes(app: FastAPI, parts: Parts, name: str, settings: ServeSettings) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "flexgen-bench"}

    async def answer(url: str, request: Request) -> Response:
        body = await json_body(request, settings.body_bytes, settings.request_s)
        parsed = await run_in_threadpool(parts.reader.read, url, body, secrets.randbelow(2**31))
        return await parts.answering.answer(parsed, request)

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await answer(COMPLETIONS, request)

    @app.post(CHAT)
    async def chat_completions(request: Request) -> Response:
        return await answer(CHAT, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise RequestError(f"There is no model {model_id!r}.", "model", "model_not_found", NOT_FOUND)
        return model

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not parts.loop.is_alive:
            raise RequestError("The computing thread has ended.", None, "dead", UNAVAILABLE)
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        own = parts.metrics
        own.in_system.set(parts.loop.in_system)
        own.kv_slots.set(parts.loop.kv_slots_in_use)
        return Response(own.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        refusal = RequestError(f"{first['loc'][-1]}: {first['msg']}.", str(first["loc"][-1]), "invalid_value")
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == NOT_FOUND else "bad_request"
        refusal = RequestError(f"{request.method} {request.url.path}: {error.detail}.", None, code, error.status_code)
        return JSONResponse(refusal.body(), error.status_code, dict(error.headers or {}))
