"""What the OpenAPI document says beside what FastAPI finds by itself: bodies, refusals, files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.routing import compile_path

from tav_opt.api.answers import Refusal
from tav_opt.api.asked_fields import SOURCE, files, request_model
from tav_opt.api.orders import Kind

_SCHEMAS = "#/components/schemas/{model}"
_REASONS = {
    400: "something in the request is wrong",
    401: "the key is missing or unknown",
    403: "there are no keys, and a page of another site asks",
    404: "there is no such video or model",
    413: "the body is too large",
    415: "the body is neither JSON nor a form",
    429: "too many videos are waiting or in work",
    503: "no server answers, or there is no room",
}


def refused_with(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, of which some are those of all but the one that tells of health."""
    content = {"application/json": {"schema": {"$ref": _SCHEMAS.format(model=Refusal.__name__)}}}
    return {
        status: {"description": _REASONS[status], "content": content} for status in sorted({400, 401, 403, *statuses})
    }


def sent_as(kinds: Mapping[Any, tuple[str, str]]) -> dict[int | str, dict[str, Any]]:
    """The files of a route, of these types."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    content = {kind: schema for _, kind in kinds.values()}
    parts = {206: "the part of it that Range asks for", 416: "it has no such part"}
    whole: dict[int | str, dict[str, Any]] = {200: {"description": "the file", "content": content}}
    return whole | {status: {"description": said} for status, said in parts.items()}


def asked_by(kind: Kind) -> dict[str, Any]:
    """The body of a route: the same fields in JSON and in a form, where files come as they are."""
    in_json = request_model(kind).model_json_schema(ref_template=_SCHEMAS)
    in_json.pop("$defs")
    in_form = copy.deepcopy(in_json)
    for name in {SOURCE, "video", *files()} & set(in_form["properties"]):
        in_form["properties"][name] = {"type": "string", "format": "binary"}
    content = {"application/json": {"schema": in_json}, "multipart/form-data": {"schema": in_form}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI) -> dict[str, Any]:
    """Of the application; what FastAPI says of refusals that are never sent is left out."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operation in (one for methods in found["paths"].values() for one in methods.values()):
            operation["responses"].pop("422", None)
        schemas = found["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        refusal = Refusal.model_json_schema(ref_template=_SCHEMAS)
        schemas |= {
            Refusal.__name__: refusal,
            **refusal.pop("$defs"),
            **request_model("videos").model_json_schema()["$defs"],
        }
        app.openapi_schema = found
    return app.openapi_schema


def methods(app: FastAPI, path: str) -> str:
    """By which a path is asked, as the header Allow has it; a path of its own goes before those with parameters."""
    paths = app.openapi()["paths"]
    found: dict[str, Any] = paths.get(path) or next(
        (paths[one] for one in paths if compile_path(one)[0].match(path)), {}
    )
    return ", ".join(name.upper() for name in found)
