"""Before every route: keys; after it: counts, and an answer to what nobody has expected."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexgen_bench.requests.errors import SERVER_ERROR, UNAUTHORIZED, UNAVAILABLE, RequestError
from flexgen_bench.serve.metrics import Metrics

_log = logging.getLogger("flexgen_bench.serve")
_OPEN = ("/health",)  # without a key


class Guard:
    """Plain ASGI, so that a client's going away reaches the routes as it comes. keys: none lets everybody in."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if not self._may(scope):
            refusal = RequestError("The key is missing or unknown.", None, "invalid_api_key", UNAUTHORIZED)
            await JSONResponse(refusal.body(), refusal.status, {"WWW-Authenticate": "Bearer"})(scope, receive, noted)
        else:
            try:
                await self._app(scope, receive, noted)
            except ClientDisconnect:
                pass  # in the middle of its body
            except asyncio.CancelledError:  # the server goes down, and this took longer than it may then
                if not status:
                    refusal = RequestError("The server is going down.", None, "shutting_down", UNAVAILABLE)
                    await JSONResponse(refusal.body(), refusal.status)(scope, receive, noted)
            except Exception as error:
                _log.exception("%s %s", scope["method"], scope["path"])
                if not status:
                    failure = RequestError(f"{type(error).__name__}: {error}", None, "internal", SERVER_ERROR)
                    await JSONResponse(failure.body(), failure.status)(scope, receive, noted)
        route = getattr(scope.get("route"), "path", "unknown")  # a path of its own for each would be without bound
        self._metrics.requests.labels(route, str(status)).inc()

    def _may(self, scope: Scope) -> bool:
        if not self._keys or scope["path"] in _OPEN:
            return True
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        known = [hmac.compare_digest(given, key) for key in self._keys]  # each, so that time tells nothing
        return any(known)
