"""Routes of ``/v1/files`` and ``/v1/batches``."""

from __future__ import annotations

import shutil
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from flexgen_bench.requests.errors import NO_LENGTH, NOT_FOUND, TOO_LARGE, RequestError, of_validation
from flexgen_bench.requests.forms import FORMS
from flexgen_bench.serve.batches import Batches
from flexgen_bench.serve.files import Document, Documents, FileStore
from flexgen_bench.serve.http_body import json_body
from flexgen_bench.serve.settings import ServeSettings

_MOST_LISTED = 100
Limit = Annotated[int, Query(ge=1, le=10_000)]
Order = Literal["asc", "desc"]


class BatchForm(BaseModel):
    """A new batch. completion_window: OpenAI's is always 24h; here any number of hours or days."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = Field(default=None, max_length=16)


def add_batch_routes(
    app: FastAPI, files: FileStore, batches: Batches, documents: Documents, settings: ServeSettings
) -> None:
    @app.post("/v1/files")
    async def upload(request: Request) -> Document:
        stated = request.headers.get("content-length", "")
        if not stated.isdecimal():
            message = "A file is sent as a whole, with a Content-Length."
            raise RequestError(message, "file", "length_required", NO_LENGTH)
        if int(stated) > settings.file_bytes:
            message = f"content-length = {stated}: a file has at most {settings.file_bytes} bytes."
            raise RequestError(message, "file", "file_too_large", TOO_LARGE)
        async with request.form(max_files=1, max_fields=10) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise RequestError("file is missing.", "file", "missing_required_parameter")
            if purpose != "batch":
                raise RequestError(f"purpose = {purpose!r}: must be 'batch'.", "purpose", "invalid_value")
            name, path = files.new_path()
            try:
                with path.open("wb") as target:
                    await run_in_threadpool(shutil.copyfileobj, file.file, target)
                return files.add(name, file.filename or "input.jsonl", "batch")
            except BaseException:  # a full disk: half of a file, which nobody could ask for or delete
                files.discard(name)
                raise

    @app.get("/v1/files")
    async def list_files(
        limit: Limit = _MOST_LISTED, after: str | None = None, order: Order = "desc", purpose: str | None = None
    ) -> dict[str, Any]:
        every = [d for d in files.documents.all() if purpose in (None, d["purpose"])]
        return _page(every if order == "desc" else every[::-1], limit, after)

    @app.get("/v1/files/{file_id}")
    async def one_file(file_id: str) -> Document:
        return files.documents.get(file_id)

    @app.get("/v1/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        files.documents.get(file_id)
        path = files.content(file_id)
        if not path.exists():
            raise RequestError(f"The content of {file_id} is gone.", "file_id", "not_found", NOT_FOUND)
        return FileResponse(path, media_type="application/jsonl")

    @app.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> dict[str, Any]:
        files.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @app.post("/v1/batches")
    async def create(request: Request) -> Document:
        body = await json_body(request, settings.body_bytes, settings.request_s)
        if not isinstance(body, dict):
            raise RequestError("The body must be a JSON object.", "body", "invalid_value")
        try:
            form = BatchForm.model_validate(body)
        except ValidationError as error:
            raise of_validation(error) from error
        if form.endpoint not in FORMS:
            message = f"endpoint = {form.endpoint!r}: must be one of {', '.join(FORMS)}."
            raise RequestError(message, "endpoint", "invalid_value")
        return batches.create(form.input_file_id, form.endpoint, form.completion_window, form.metadata)

    @app.get("/v1/batches")
    async def list_batches(limit: Limit = _MOST_LISTED, after: str | None = None) -> dict[str, Any]:
        return _page(documents.all(), limit, after)

    @app.get("/v1/batches/{batch_id}")
    async def one_batch(batch_id: str) -> Document:
        return documents.get(batch_id)

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Document:
        return await run_in_threadpool(batches.cancel, batch_id)


def _page(documents: list[Document], limit: int, after: str | None) -> dict[str, Any]:
    """Some of a list, from behind the one with the id ``after``."""
    names = [document["id"] for document in documents]
    if after is not None and after not in names:  # from the beginning again, a client would never come to an end
        raise RequestError(f"after = {after[:80]!r}: is not in the list.", "after", "not_found", NOT_FOUND)
    start = 0 if after is None else names.index(after) + 1
    part = documents[start : start + limit]
    return {
        "object": "list",
        "data": part,
        "first_id": part[0]["id"] if part else None,
        "last_id": part[-1]["id"] if part else None,
        "has_more": start + len(part) < len(documents),
    }
