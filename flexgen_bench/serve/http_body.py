"""Bodies of requests, as far as they are JSON and not too large."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request

from flexgen_bench.requests.errors import TOO_LARGE, TOO_SLOW, RequestError


async def json_body(request: Request, limit: int, seconds: float) -> Any:
    """The body as JSON; RequestError if it is too large, too slow or no JSON."""
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise RequestError(f"The body is larger than {limit} bytes.", None, "body_too_large", TOO_LARGE)
    except TimeoutError as error:
        raise RequestError(f"The body took more than {seconds} s to come.", None, "timeout", TOO_SLOW) from error
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is no JSON: {error}.", None, "invalid_json") from error
