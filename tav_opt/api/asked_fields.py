"""What a request may say: OpenAI's fields, and a field of every setting of the contract, made of it."""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, create_model

from tav_opt.client.sources import FITTING
from tav_opt.config import ClipConfig, EditConfig, Within
from tav_opt.contract import CONTROL_INPUTS, MAX_PROMPTS, MAX_TEXT_BYTES, STREAM_INPUTS, Request, ServedTensor

SPOKEN_FOR = ("clip", "prompt", "video", "source_frames", "preview_interval", "output", *CONTROL_INPUTS)
"""Inputs of the contract that OpenAI's own fields stand for, what the API decides itself, and maps, which it lacks."""
CHOOSING = tuple(name for name in FITTING if name != "frames")
"""Which frames of a source are taken, and how; they are as many as the clip's, as `num_frames` says."""
SOURCE = "input_reference"
"""OpenAI's name of what is edited in the clip's place; of `edits` it is `video`."""
_DTYPES: dict[str, Any] = {"STRING": str, "FP32": float, "BOOL": bool}


def _utf8(text: str) -> str:
    if len(text.encode(errors="surrogatepass")) > MAX_TEXT_BYTES:
        raise ValueError(f"has more than {MAX_TEXT_BYTES} bytes")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("is not UTF-8")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_BYTES), AfterValidator(_utf8)]


class Made(BaseModel):
    """A video that this API made."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: Annotated[str, StringConstraints(max_length=64)]
    """Of a completed job."""


Sent = Annotated[str, Field(json_schema_extra={"format": "data-url"}, description="data:video/mp4;base64,…")]
Reference = Made | Sent


class Asked(BaseModel):
    """What is common to all requests; settings that are left out are the preset's, the clip's own or the defaults."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_BYTES), AfterValidator(_utf8)] = Field(
        description="what to draw"
    )
    model: Annotated[Text | None, Field(description="an exported clip, or clip@preset; the only one by default")] = None
    seconds: Annotated[str | float | None, Field(description="as the clip has them; others are refused")] = None
    size: Annotated[str | None, Field(description="widthxheight as the clip has them; others are refused")] = None
    num_frames: Annotated[int | None, Field(description="as the clip has them; others are refused")] = None
    num_inference_steps: Annotated[int | None, Field(description="another name of steps")] = None


@cache
def request_model(kind: Literal["videos", "edits"]) -> type[Asked]:
    """The fields of a request to make a video, or to edit one."""
    name, doc = ("VideoRequest", "A video.") if kind == "videos" else ("VideoEditRequest", "An edit of a video.")
    fields = {**_fitting_fields(), **{tensor.name: _field(tensor) for tensor in settings()}}
    told = Field(None if kind == "videos" else ..., description="a video to edit in the clip's place")
    source = (Reference | None if kind == "videos" else Reference, told)
    own: dict[str, Any] = {SOURCE if kind == "videos" else "video": source, **fields}
    return create_model(name, __base__=Asked, __doc__=doc, **own)


def settings() -> list[ServedTensor]:
    """The inputs of the contract that requests may set."""
    return [tensor for tensor in STREAM_INPUTS if tensor.name not in SPOKEN_FOR]


@cache
def files() -> frozenset[str]:
    """The settings that are files: sent on as they are, or as frames that are fitted to the clip."""
    return frozenset(tensor.name for tensor in settings() if bytes in _parts(_hint(tensor))) | frames()


@cache
def frames() -> frozenset[str]:
    """Of these, the ones that are frames on the wire."""
    return frozenset(tensor.name for tensor in settings() if len(tensor.shape) == 4)


def lists(kind: type[Asked]) -> frozenset[str]:
    """The fields that take several values."""
    return frozenset(
        n for n, f in kind.model_fields.items() if any(get_origin(p) is tuple for p in _parts(f.annotation))
    )


def _fitting_fields() -> dict[str, Any]:
    hints = get_type_hints(ClipConfig, include_extras=True)
    told = {"start": "first frame of the source", "stride": "every so manieth of its frames", "fit": "how it is fitted"}
    told["uniform"] = "spread over the source, instead of start and stride"
    return {n: (_checked(hints[n]) | None, Field(None, description=f"{told[n]}; as in tune")) for n in CHOOSING}


def _field(tensor: ServedTensor) -> Any:
    return (_checked(_hint(tensor)) | None, Field(None, description=tensor.doc))


def _hint(tensor: ServedTensor) -> Any:
    """Its type where the settings have one, with its range; else what its tensor holds."""
    if len(tensor.shape) > 1:
        return bytes
    hints = get_type_hints(Request, include_extras=True) | get_type_hints(EditConfig, include_extras=True)
    if tensor.name in hints and tensor.name != "edit" and _is_plain(hints[tensor.name]):
        return hints[tensor.name]
    one: Any = _DTYPES.get(tensor.dtype, int)
    return one if tensor.shape == (1,) else tuple.__class_getitem__((one, ...))


def _is_plain(hint: Any) -> bool:
    plain = {str, int, float, bool, bytes, type(None), Ellipsis}
    return all(part in plain for part in _parts(hint) if get_origin(part) is None and not isinstance(part, str))


def _parts(hint: Any) -> Iterable[Any]:
    """A type and all that it is made of; of a Literal its values."""
    yield hint
    arguments = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    for part in arguments:
        yield from _parts(part)


def _checked(hint: Any) -> Any:
    """The same with pydantic's ranges in place of ours."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is str:
        return Text
    if hint is bytes:
        return Sent
    if origin is Annotated:
        found = _checked(arguments[0])
        for within in (extra for extra in arguments[1:] if isinstance(extra, Within)):
            found = Annotated[found, _range(within)]
        return found
    if origin in (Union, types.UnionType):
        return Union[tuple(_checked(part) for part in arguments)]  # noqa: UP007 — made of what there is
    if origin is tuple:
        parts = tuple(part if part is Ellipsis else _checked(part) for part in arguments)
        found = tuple.__class_getitem__(parts)
        return Annotated[found, Field(max_length=MAX_PROMPTS)] if Ellipsis in parts else found
    return hint


def _range(within: Within) -> Any:
    return Field(ge=within.low, lt=within.high) if within.below else Field(ge=within.low, le=within.high)
