"""The application: its routes, and how it refuses."""

from __future__ import annotations

import sqlite3
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tav_opt import __version__
from tav_opt.api import answers, described, videos
from tav_opt.api.answers import Health, Model, Models, Refused, refusal
from tav_opt.api.asking import Owner, TheService, known_query
from tav_opt.api.bodies import TooLarge, WrongKind
from tav_opt.api.described import refused_with
from tav_opt.api.orders import PRESET_SIGN, UnknownModel, model_of
from tav_opt.api.service import Service
from tav_opt.config import PRESETS, InputError
from tav_opt.files import DiskFull

models = APIRouter(tags=["models"], dependencies=[Depends(known_query)])
state = APIRouter()


@models.get("/v1/models", responses=refused_with(503))
async def list_models(_owner: Owner, service: TheService) -> Models:
    """The exported clips; each is a model, and with a preset behind it, as clip@fast, another."""
    return Models(data=[answers.model(name, clip) for name, clip in (await service.clips()).items()])


@models.get("/v1/models/{name}", responses=refused_with(404, 503))
async def retrieve_model(name: str, _owner: Owner, service: TheService) -> Model:
    """An exported clip, maybe with a preset."""
    clips = await service.clips()
    clip, sign, preset = model_of({"model": name}, clips).partition(PRESET_SIGN)
    if sign and preset not in PRESETS:
        raise UnknownModel(f"preset {preset[:63]!r} is not {', '.join(PRESETS)}")
    return answers.model(name, clips[clip])


@state.get("/health", responses={503: {"model": Health, "description": "no server answers"}})
async def health(service: TheService) -> Any:
    """Whether the API answers, which needs no key, and whether the server does."""
    live = await service.client.is_live()
    told = Health(status="ok" if live else "no server")
    return JSONResponse(told.model_dump(), status_code=200 if live else 503)


def application(service: Service) -> FastAPI:
    """The ASGI callable."""
    app = FastAPI(
        title="tav-opt",
        version=__version__,
        description="OpenAI's videos API, for the clips of a running server.",
        docs_url=None,  # they are pages of others' scripts
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(videos.router)
    app.include_router(models)
    app.include_router(state)
    for kind in (Refused, InputError, RequestValidationError, HTTPException, sqlite3.Error):
        app.add_exception_handler(kind, _refuse)
    app.openapi = lambda: described.document(app)  # type: ignore[method-assign]
    return app


def _refuse(request: Request, error: Exception) -> JSONResponse:
    refused = _refused(error)
    if refused.status == 405:
        refused.headers["Allow"] = described.methods(request.app, request.url.path)
    return refusal(refused)


def _refused(error: Exception) -> Refused:
    match error:
        case Refused():
            return error
        case UnknownModel():
            return Refused(404, str(error), "model_not_found")
        case WrongKind():
            return Refused(415, str(error))
        case TooLarge():
            return Refused(413, str(error))
        case DiskFull() | sqlite3.Error():
            return Refused(503, f"nothing can be written: {error}", "storage_full", Retry_After="60")
        case RequestValidationError():
            first = error.errors()[0]
            return Refused(400, f"{first['loc'][-1]} {str(first.get('input'))[:60]!r}: {first['msg']}")
        case HTTPException():
            found = Refused(error.status_code, str(error.detail))
            found.headers = dict(error.headers or {})
            return found
    return Refused(400, str(error))
