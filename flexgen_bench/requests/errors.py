"""What is wrong with a request, in OpenAI's form: a status, and a JSON body that names the field."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from flexgen_bench.core.errors import UserError

# Statuses of HTTP, which lines of a batch carry, too.
BAD_REQUEST, UNAUTHORIZED, NOT_FOUND, TOO_SLOW = 400, 401, 404, 408
NO_LENGTH, TOO_LARGE, TOO_MANY = 411, 413, 429
SERVER_ERROR, UNAVAILABLE, TIMED_OUT = 500, 503, 504
_SHOWN = 200  # characters of a value that is refused
_MOST_MESSAGE, _MOST_PARAM = 1000, 100  # characters of what a request may have given in the middle of them


class RequestError(Exception):
    """A request that cannot be answered. param: its field; code: a word for programs; headers: of the answer.

    Of what a request has given no more is repeated than fits into a message, and nothing that is no text.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = BAD_REQUEST,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _shortened(message, _MOST_MESSAGE)
        super().__init__(message)
        self.message, self.code, self.status = message, code, status
        self.param = param and _shortened(param, _MOST_PARAM)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """As OpenAI's API states errors."""
        kind = "server_error" if self.status >= SERVER_ERROR else "invalid_request_error"
        kind = {TOO_MANY: "rate_limit_error", UNAUTHORIZED: "authentication_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _shortened(text: str, most: int) -> str:
    """The beginning and the end of a long text; half of a character (a surrogate) as its escape."""
    text = text.encode(errors="backslashreplace").decode()
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]}...{text[-tail:]}"


def of_user_error(error: UserError, param: str | None = None) -> RequestError:
    """The same in this form. param: the request's own name of the field, if it is another."""
    return RequestError(str(error), param or re.split(r"[\[.]", error.field)[0], "invalid_value")


def of_validation(error: ValidationError) -> RequestError:
    """The first of the fields that a form refuses: of a field that may be of several kinds, all of these together."""
    first = error.errors(include_url=False)[0]
    names = [str(part) for part in first["loc"]]
    name = names[0] if names else None
    kinds = [e["msg"] for e in error.errors(include_url=False) if [str(p) for p in e["loc"]][:1] == names[:1]]
    subject = name or "The body"
    given = repr(first.get("input"))
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
    if first["type"] == "missing":
        return RequestError(f"{'.'.join(names)} is missing.", name, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        message = f"{'.'.join(names)} is not a field of this request, or not one that is implemented. Leave it out."
        return RequestError(message, name, "unknown_parameter")
    return RequestError(f"{subject} = {shown}: {'; or: '.join(dict.fromkeys(kinds))}.", name, "invalid_value")
