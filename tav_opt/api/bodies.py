"""Bodies of requests, in JSON or as a form: the fields, checked, and the files, which have no names of the client's."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from tav_opt.api.asked_fields import SOURCE, Asked, files, lists, request_model
from tav_opt.api.orders import Kind
from tav_opt.config import InputError

T = TypeVar("T")
BODY_SECONDS = 120.0
"""Within which a request's body must have come."""
MAX_FIELDS = 128
MAX_FIELD_BYTES = 1 << 20
"""Of a field of a form that is no file."""
SENT = "data:"
"""Stands for a file where the fields are kept."""
_JSON, _FORM = "application/json", "multipart/form-data"


class WrongKind(InputError):
    """The body is neither JSON nor a form."""


class TooLarge(InputError):
    """The body has more bytes than may be sent."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What was asked for."""

    asked: Mapping[str, Any]
    """The fields that were given; SENT for a file."""
    files: Mapping[str, IO[bytes]]
    """By field."""


@asynccontextmanager
async def body_of(request: Request, kind: Kind, most_mib: int) -> AsyncIterator[Body]:
    """Reads a body, and forgets its files at the end; raises InputError for one that is not as it should be.

    One that says that it has more than `most_mib` is not read; of others no more than that is.
    """
    request = _limited(request, most_mib)
    model, sources = request_model(kind), {SOURCE if kind == "videos" else "video"}
    given = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
    if given == _JSON:
        yield _of_json(await _come(request.body()), model, sources)
    elif given == _FORM:
        limits = {"max_files": 1 + len(files()), "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
        form = await _come(request.form(**limits))
        try:
            yield _of_form(form, model, sources)
        finally:
            await form.close()
    else:
        raise WrongKind(f"content-type {given[:63]!r}: must be {_JSON} or {_FORM}")


def _limited(request: Request, most_mib: int) -> Request:
    """The same, whose body ends with TooLarge where it is."""
    most, came = most_mib << 20, 0
    too_large = TooLarge(f"the body has more than {most_mib} MiB, the most that may be sent")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > most:
        raise too_large

    async def receive() -> Message:
        nonlocal came
        message = await request.receive()
        came += len(message.get("body", b""))
        if came > most:
            raise too_large
        return message

    return Request(request.scope, receive)


async def _come(body: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await body
    except TimeoutError:
        raise InputError(f"the body did not come within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise InputError("the client has left") from None


def _of_json(data: bytes, model: type[Asked], sources: set[str]) -> Body:
    try:
        asked = model.model_validate_json(data, strict=True).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(_first(error)) from None
    sent = {name: _decoded(name, asked[name]) for name in sources | files() if isinstance(asked.get(name), str)}
    return Body(asked=asked | dict.fromkeys(sent, SENT), files=sent)


def _decoded(name: str, url: str) -> IO[bytes]:
    """A file of a data URL (RFC 2397); no other is fetched."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise InputError(f"{name} {url[:40]!r}: must be data:video/mp4;base64,… or the id of a video made here")
    try:
        return io.BytesIO(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError):
        raise InputError(f"{name}: its data is not base64") from None


def _of_form(form: FormData, model: type[Asked], sources: set[str]) -> Body:
    fields, sent = _fields(form, lists(model))
    if wrong := sorted(set(sent) - sources - files()):
        raise InputError(f"{wrong[0][:63]} is a file: files are {', '.join(sorted(sources | files()))}")
    if wrong := sorted(name for name in (sources | files()) & set(fields) if isinstance(fields[name], str)):
        fields, found = dict(fields), {name: _decoded(name, fields[name]) for name in wrong}
        sent = {**sent, **found}
    try:
        values = {**fields, **dict.fromkeys(sent, SENT)}
        asked = model.model_validate(values, strict=False).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(_first(error)) from None
    return Body(asked=asked, files=sent)


def _fields(form: FormData, several: frozenset[str]) -> tuple[dict[str, Any], dict[str, IO[bytes]]]:
    """A form's values and files by name: `name[]` are the items of a list, `name[key]` an entry of an object.

    `extra_body` holds more of them in JSON, as SGLang-Diffusion has it. Raises InputError for a field that comes twice.
    """
    fields: dict[str, Any] = {}
    sent: dict[str, IO[bytes]] = {}
    for name, key, value in _parts(form):
        if isinstance(value, UploadFile):
            if name in sent:
                raise InputError(f"{name[:63]} comes twice")
            sent[name] = value.file
        elif name == "extra_body" and not key:
            fields |= _object(value)
        elif name in several:
            fields.setdefault(name, []).append(value)
        elif key:
            fields.setdefault(name, {})
            if not isinstance(fields[name], dict) or key in fields[name]:
                raise InputError(f"{name[:63]} comes twice")
            fields[name][key] = value
        elif name in fields:
            raise InputError(f"{name[:63]} comes twice")
        else:
            fields[name] = value
    return fields, sent


def _parts(form: FormData) -> Iterator[tuple[str, str, Any]]:
    """Name, key in brackets, value."""
    for name, value in form.multi_items():
        name, bracket, key = name.partition("[")
        yield name, key.removesuffix("]") if bracket else "", value


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError("extra_body is no JSON object")
    return found


def _first(error: ValidationError) -> str:
    """The first of what is wrong, with its field and value, in one line."""
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    given = "" if first["type"] in ("missing", "json_invalid") else f" {str(first['input'])[:60]!r}"
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{name[:63]} is unknown; see /openapi.json for what there is"
    return f"{name[:120]}{given}: {said}".removeprefix(": ")
