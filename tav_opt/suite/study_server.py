"""A small server for one study: raters get its page and send their answers back."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tav_opt.config import InputError
from tav_opt.suite import rater_answers
from tav_opt.suite.study import PAGE_FOLDER, Study, read

MAX_BYTES = 4 << 20
"""Of one rater's answers; a thousand pairs have some 200 kB."""
MAX_RATERS = 10_000
_PRIVATE = {"cache-control": "no-store", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def app(folder: Path, study: Study, on_answers: Callable[[rater_answers.Answers], object]) -> Starlette:
    """The page and what lies beside it at `/`, and `POST /answers`; the key is not served."""

    async def take(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":  # other sites' forms cannot send this kind
            return PlainTextResponse("answers are application/json", 415, _PRIVATE)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BYTES:
                return PlainTextResponse(f"answers have {MAX_BYTES} bytes at most", 413, _PRIVATE)
        try:
            found = rater_answers.checked(json.loads(body), study, "answers")
        except (InputError, ValueError, RecursionError) as error:
            told = str(error) if isinstance(error, InputError) else "this is not JSON"
            return PlainTextResponse(told, 400, _PRIVATE)
        if len(list((folder / rater_answers.ANSWERS).iterdir())) >= MAX_RATERS:
            return PlainTextResponse(f"{MAX_RATERS} have answered", 507, _PRIVATE)
        try:
            rater_answers.keep(folder, found)
        except InputError as error:
            return PlainTextResponse(str(error), 409, _PRIVATE)
        on_answers(found)
        return PlainTextResponse("taken", 200, _PRIVATE)

    page = StaticFiles(directory=folder / PAGE_FOLDER, html=True)
    return Starlette(routes=[Route("/answers", take, methods=["POST"]), Mount("/", page)])


def serve(folder: Path, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serves a study until it is told to stop; raises InputError where there is none, or the port is taken."""
    study = read(folder)
    if not (folder / PAGE_FOLDER / "index.html").is_file():
        raise InputError(f"{folder} has no page for raters: make the study again")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{host}:{port} cannot be listened at: {getattr(error, 'strerror', None) or error}") from None
    taken = app(folder, study, lambda found: say(f"{found.rater}: {len(found.answers)} answers"))
    config = uvicorn.Config(taken, log_level="error", access_log=False, server_header=False, limit_concurrency=256)
    with listener:
        shown = f"[{host}]" if ":" in host else host
        say(f"study of {len(study.items)} pairs: http://{shown}:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])
