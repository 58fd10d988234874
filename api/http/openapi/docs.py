"""The operations of ``http/docs.py``."""

from __future__ import annotations

from api.http.openapi.parts import JSON, Answer, Operation, Operations, path, text
from api.settings import Settings


def operations(_: Settings) -> Operations:
    """All of them."""
    kept = {"ETag": text(), "Cache-Control": text()}
    known = Answer("It is still what `If-None-Match` says.", headers=kept)
    return {
        "GET /openapi.json": Operation(
            id="openapi",
            tag="Documents",
            summary="This description, as OpenAPI 3.1",
            answers={
                200: Answer("The document.", {JSON: {"type": "object", "required": ["openapi", "paths"]}}, kept),
                304: known,
            },
        ),
        "GET /docs": Operation(
            id="docs",
            tag="Documents",
            summary="A page to read it, and to try it",
            answers={200: Answer("The page.", {"text/html": {"type": "string"}})},
        ),
        "GET /docs/{file}": Operation(
            id="docsFile",
            tag="Documents",
            summary="What the page is made of",
            parameters=(path("file", text(minLength=1), "its name", "start.js"),),
            answers={
                200: Answer("The file.", {"text/javascript": {"type": "string"}, "text/css": {"type": "string"}}, kept),
                304: known,
            },
            errors=("NOT_FOUND",),
        ),
    }
