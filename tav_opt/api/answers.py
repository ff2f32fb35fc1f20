"""What the API says, in OpenAI's shapes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from tav_opt.api.jobs import ErrorCode, Job, Status
from tav_opt.api.orders import seconds_of, size_of
from tav_opt.contract import ServedClip


class VideoError(BaseModel):
    """Why there is no video."""

    code: ErrorCode
    message: str


class Video(BaseModel):
    """A video that was asked for."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100, description="per cent")
    created_at: int = Field(description="seconds since 1970, as all times")
    completed_at: int | None
    expires_at: int | None
    error: VideoError | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    queue_position: int | None = Field(description="how many of the waiting came before it")
    settings: dict[str, Any] | None = Field(description="what the server says that it was made with")


class Videos(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A video that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """An exported clip."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="0: the server does not tell")
    owned_by: Literal["tav-opt"] = "tav-opt"
    caption: str = Field(description="that the clip was tuned on")
    frames: int
    fps: float
    seconds: str
    size: str


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server answers."""

    status: Literal["ok", "no server"]


class Fault(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str | None = None


class Refusal(BaseModel):
    """In the place of what was asked for."""

    error: Fault


class Refused(Exception):
    """What a client is told in an answer's place."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


_TYPES: dict[int, Any] = {401: "authentication_error", 429: "rate_limit_error"}


def refusal(refused: Refused) -> JSONResponse:
    """As OpenAI's clients read it."""
    kind = _TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    fault = Fault(message=refused.message, type=kind, code=refused.code)
    return JSONResponse(Refusal(error=fault).model_dump(), status_code=refused.status, headers=refused.headers)


def video(job: Job, percent: int, position: int | None) -> Video:
    """A job as it stands."""
    failed = None if job.error_code is None else VideoError(code=job.error_code, message=job.error_message or "")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=percent,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        error=failed,
        prompt=job.prompt,
        seconds=job.seconds,
        size=job.size,
        remixed_from_video_id=job.remixed_from,
        queue_position=position,
        settings=None if job.settings is None else dict(job.settings),
    )


def model(name: str, clip: ServedClip) -> Model:
    """A clip, maybe with a preset behind its name."""
    return Model(
        id=name,
        created=0,
        caption=clip.prompt,
        frames=clip.frames,
        fps=clip.fps,
        seconds=seconds_of(clip, {}),
        size=size_of(clip),
    )
