"""One request over HTTP: queued, computed, answered whole or as it comes; cancelled when its client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from flexgen_bench.requests.answers import Writer, new_id, usage_of
from flexgen_bench.requests.asked import ParsedRequest
from flexgen_bench.requests.errors import TIMED_OUT, TOO_MANY, RequestError
from flexgen_bench.requests.json_line import json_line
from flexgen_bench.serve.engine_loop import Answered, EngineLoop, Event, Ticket
from flexgen_bench.serve.metrics import Metrics
from flexgen_bench.serve.pace import Pace
from flexgen_bench.serve.settings import ServeSettings

CLIENT_GONE = 499  # as nginx calls it; nobody reads it


class Answering:
    """Answers what is asked with one engine loop."""

    def __init__(self, loop: EngineLoop, writer: Writer, settings: ServeSettings, metrics: Metrics) -> None:
        self._loop, self._writer, self._settings, self._metrics = loop, writer, settings, metrics
        self._pace = Pace()

    async def answer(self, parsed: ParsedRequest, request: Request) -> Response:
        """The whole answer, or a stream of its parts. RequestError for a full queue and for what fails."""
        settings, begin = self._settings, time.monotonic()
        waiting = self._loop.in_system - settings.sequences
        if waiting + len(parsed.sequences) > settings.queue:
            seconds = self._pace.retry_after(max(waiting, 1), settings.sequences)
            message = f"The queue is full: {max(waiting, 0)} wait. Try again in about {seconds} s."
            raise RequestError(message, None, "queue_full", TOO_MANY, {"Retry-After": str(seconds)})
        here, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        ticket = self._loop.submit(parsed, lambda event: here.call_soon_threadsafe(events.put_nowait, event))
        if parsed.streams:
            parts = self._parts(parsed, ticket, events, begin)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(parsed, ticket, events, begin, request)

    async def _whole(
        self, parsed: ParsedRequest, ticket: Ticket, events: asyncio.Queue[Event], begin: float, request: Request
    ) -> Response:
        gone, begun = asyncio.ensure_future(_disconnected(request)), False
        try:
            while True:
                event = await self._next(events, begin, gone)
                if event is None:
                    return Response(status_code=CLIENT_GONE)
                if isinstance(event, RequestError):
                    raise event
                if isinstance(event, Answered):
                    body = self._writer.body(parsed, event.outputs, event.of_prompts, event.kept_tokens)
                    self._account(body["usage"], begin)
                    return JSONResponse(body)
                if not begun:
                    begun = True
                    self._metrics.first_s.observe(time.monotonic() - begin)
        finally:
            gone.cancel()
            self._loop.cancel(ticket)

    async def _parts(
        self, parsed: ParsedRequest, ticket: Ticket, events: asyncio.Queue[Event], begin: float
    ) -> AsyncIterator[bytes]:
        answer_id, places = new_id(parsed), dict[int, int]()
        try:
            while True:
                event = await self._next(events, begin)
                if isinstance(event, RequestError):
                    yield _sent(event.body())
                    return
                if isinstance(event, Answered):
                    break
                assert event is not None
                choice, piece = event
                if not places:
                    self._metrics.first_s.observe(time.monotonic() - begin)
                place = places.get(choice)
                if piece.text or piece.finish_reason or parsed.logprobs is not None or place is None:
                    yield _sent(self._writer.chunk(parsed, answer_id, choice, piece, place))
                places[choice] = (place or 0) + self._writer.characters(piece.token_ids)
            tokens = sum(len(output.token_ids) for output in event.outputs)
            usage = usage_of(parsed, tokens, event.kept_tokens)
            if parsed.include_usage:
                yield _sent(self._writer.usage_chunk(parsed, answer_id, usage))
            self._account(usage, begin)
            yield b"data: [DONE]\n\n"
        except RequestError as error:
            yield _sent(error.body())
        finally:
            self._loop.cancel(ticket)

    async def _next(
        self, events: asyncio.Queue[Event], begin: float, gone: asyncio.Future[None] | None = None
    ) -> Event | None:
        """The next event; None if the client has gone. RequestError when the time is over."""
        left = begin + self._settings.request_s - time.monotonic()
        getting = asyncio.ensure_future(events.get())
        waited_for: set[asyncio.Future[Any]] = {getting} if gone is None else {getting, gone}
        try:
            done, _ = await asyncio.wait(waited_for, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            getting.cancel()
            raise
        if getting in done:
            return getting.result()
        getting.cancel()
        if not done:
            message = f"The answer took more than {self._settings.request_s} s and was ended."
            raise RequestError(message, None, "timeout", TIMED_OUT)
        return None

    def _account(self, usage: dict[str, Any], begin: float) -> None:
        self._pace.note(begin)
        self._metrics.request_s.observe(time.monotonic() - begin)
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.kept_tokens.inc(usage["prompt_tokens_details"]["cached_tokens"])
        self._metrics.answer_tokens.inc(usage["completion_tokens"])


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sent(data: dict[str, Any]) -> bytes:
    return b"data: " + json_line(data) + b"\n\n"
