"""Which requests pass: those that the contract knows, word for word, whose sizes are what they say."""

from __future__ import annotations

import math
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from tav_opt.config import InputError
from tav_opt.contract import (
    CLIPS_INPUTS,
    CLIPS_MODEL,
    CLIPS_OUTPUTS,
    MAX_PROMPTS,
    NUMPY,
    STREAM_INPUTS,
    STREAM_MODEL,
    STREAM_OUTPUTS,
    UNARY_INPUTS,
    UNARY_MODEL,
    UNARY_OUTPUTS,
    ServedTensor,
    from_tensors,
)

MAX_REQUEST_BYTES = 256 << 20
"""Of a whole request, unpacked."""
MAX_SPELT_BYTES = 32 << 20
"""Of what is not raw: JSON, and values in `contents`. Read, a byte of it may take thirty."""
MAX_FIELDS = 128
"""Of a message, each input and each raw content being one. A field takes two bytes, and a hundred once it is read."""
MAX_ID_BYTES = 128
MAX_PARAMETERS = 16

Message: TypeAlias = service_pb2.ModelInferRequest


class NotFound(InputError):
    """No such model, or none of that version."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A served model as strangers see it."""

    inputs: Mapping[str, ServedTensor]
    outputs: frozenset[str]
    check: Callable[[Mapping[str, np.ndarray]], object]
    """Raises InputError for values that make no sense."""


def _model(
    inputs: Iterable[ServedTensor], outputs: Iterable[ServedTensor], check: Callable[[Mapping[str, np.ndarray]], object]
) -> Served:
    names = frozenset(tensor.name for tensor in outputs)
    return Served(inputs={tensor.name: tensor for tensor in inputs}, outputs=names, check=check)


MODELS = {
    STREAM_MODEL: _model(STREAM_INPUTS, STREAM_OUTPUTS, from_tensors),
    UNARY_MODEL: _model(UNARY_INPUTS, UNARY_OUTPUTS, from_tensors),
    CLIPS_MODEL: _model(CLIPS_INPUTS, CLIPS_OUTPUTS, lambda _: None),
}


def model(name: str, version: str = "") -> Served:
    """The model of that name; raises NotFound."""
    if name not in MODELS:
        raise NotFound(f"model {name[:63]!r} is unknown; there are {', '.join(MODELS)}")
    if version not in ("", "1"):
        raise NotFound(f"model {name} has no version {version[:63]!r}, only 1")
    return MODELS[name]


def parsed(data: bytes) -> Message:
    """A request as it came over gRPC; raises InputError for what is none."""
    if len(data) > MAX_REQUEST_BYTES:
        raise InputError(f"the request has {len(data)} bytes, {MAX_REQUEST_BYTES} at most")
    try:
        _check_fields(data)
        return with_id(Message.FromString(data))
    except DecodeError:
        raise InputError("the message is no ModelInferRequest") from None


_RAW = Message.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_DELIMITED = 2
"""The wire type of a length and so many bytes, which all fields of a request have."""


def _check_fields(data: bytes) -> None:
    """Raises InputError for more than a gateway can hold once it is read, DecodeError for what is no request.

    Source: https://protobuf.dev/programming-guides/encoding.
    """
    at = fields = spelt = 0
    while at < len(data):
        tag, at = _varint(data, at)
        size, at = _varint(data, at)
        if tag & 7 != _DELIMITED or tag >> 3 not in Message.DESCRIPTOR.fields_by_number:
            raise DecodeError
        at, fields = at + size, fields + 1
        spelt += 0 if tag >> 3 == _RAW else size
        if fields > MAX_FIELDS:
            raise InputError(f"the request has more than {MAX_FIELDS} inputs, contents, outputs and parameters")
        if spelt > MAX_SPELT_BYTES:
            raise InputError(f"the request has more than {MAX_SPELT_BYTES} bytes that are not raw: send them so")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise DecodeError


def with_id(message: Message) -> Message:
    """The request under its own id, or a new one: every answer names it."""
    message.id = message.id or secrets.token_hex(6)
    return message


def checked(message: Message) -> Message:
    """The same request made anew of what was looked at, and of nothing else.

    Raises InputError, NotFound where there is no such model.
    """
    served = model(message.model_name, message.model_version)
    if len(message.id.encode()) > MAX_ID_BYTES:
        raise InputError(f"the request's id has more than {MAX_ID_BYTES} bytes")
    tensors = {tensor.name: tensor for tensor in message.inputs}
    if len(tensors) != len(message.inputs):
        raise InputError("an input comes twice")
    if unknown := sorted(set(tensors) - set(served.inputs)):
        raise InputError(f"input {unknown[0][:63]!r} is unknown; there are {', '.join(served.inputs)}")
    fresh = Message(model_name=message.model_name, model_version=message.model_version, id=message.id)
    arrays = {}
    for tensor in message.inputs:
        check_shape(served.inputs[tensor.name], tensor.shape)
    for tensor, data in zip(message.inputs, contents(message), strict=True):
        arrays[tensor.name] = _array(served.inputs[tensor.name], tensor, data)
        fresh.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        fresh.raw_input_contents.append(data)
    served.check(arrays)
    _add_outputs(message, served, fresh)
    _add_parameters(message, served, fresh)
    return fresh


def contents(message: Message) -> list[bytes]:
    """The inputs' values as bytes, whichever of KServe's two ways they came; raises InputError for a mixture."""
    typed = [tensor for tensor in message.inputs if tensor.HasField("contents")]
    if not typed:
        if len(message.raw_input_contents) != len(message.inputs):
            told = f"{len(message.inputs)} inputs, but {len(message.raw_input_contents)} contents"
            raise InputError(f"the request has {told}")
        return list(message.raw_input_contents)
    if len(typed) != len(message.inputs) or message.raw_input_contents:
        raise InputError("the inputs' values come partly in `contents`, partly raw: give all of them one way")
    return [_packed(tensor) for tensor in typed]


_FIELDS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    "FP32": "fp32_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT64": "uint64_contents",
}


def _packed(tensor: Any) -> bytes:
    field = _FIELDS.get(tensor.datatype)
    given = [found.name for found, _ in tensor.contents.ListFields()]
    if field is None or set(given) - {field}:
        raise InputError(
            f"input {tensor.name}: {tensor.datatype[:20]!r} does not come in {', '.join(given) or 'contents'}"
        )
    if (count := len(getattr(tensor.contents, field))) != math.prod(tensor.shape):
        raise InputError(f"input {tensor.name} of shape {list(tensor.shape)} has {count} values")
    return pack(tensor.datatype, list(getattr(tensor.contents, field)), tensor.name)


def pack(datatype: str, values: list[Any], name: str) -> bytes:
    """Values as KServe has them in bytes; raises InputError for one that is not of the datatype."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    try:
        with np.errstate(over="raise"):  # else what is too large for FP32 were infinite
            return np.array(values, numpy_of(datatype)).tobytes()
    except (OverflowError, FloatingPointError, ValueError, TypeError):
        raise InputError(f"input {name}: a value is no {datatype}") from None


def wire(tensor: ServedTensor) -> str:
    """A tensor's datatype as KServe names it."""
    return "BYTES" if tensor.dtype == "STRING" else tensor.dtype


def numpy_of(datatype: str) -> Any:
    return next(found for name, found in NUMPY.items() if name == datatype)


def check_shape(known: ServedTensor, shape: Sequence[int]) -> None:
    """Raises InputError for one that the contract has not: looked at first, while nothing is unpacked yet."""
    fixed = zip(known.shape, shape, strict=False)
    if len(shape) != len(known.shape) or any(size < 1 or free not in (-1, size) for free, size in fixed):
        if known.name == "prompt" and list(shape) == [0]:
            raise InputError(f"0 prompts: 1…{MAX_PROMPTS} make a request")
        raise InputError(f"input {known.name} has shape {list(shape[:8])}, not {list(known.shape)}")
    if known.dtype == "STRING" and (count := math.prod(shape)) > MAX_PROMPTS:
        raise InputError(f"input {known.name} has {count} texts: 1…{MAX_PROMPTS} make a request")


def _array(known: ServedTensor, tensor: Any, data: bytes) -> np.ndarray:
    """Raises InputError unless datatype and bytes are what the contract says, and agree with the shape."""
    name, shape = known.name, tuple(tensor.shape)
    if tensor.datatype != wire(known):
        raise InputError(f"input {name} is {tensor.datatype[:20]!r}, not {wire(known)}")
    if tensor.parameters:
        raise InputError(f"input {name} has parameters, and there are none: shared memory is off")
    count = math.prod(shape)  # of Python's integers, which do not wrap
    if known.dtype == "STRING":
        return unpack_texts(name, count, data).reshape(shape)
    if count * np.dtype(NUMPY[known.dtype]).itemsize != len(data):
        raise InputError(f"input {name} of shape {list(shape)} has {len(data)} bytes")
    return np.frombuffer(data, NUMPY[known.dtype]).reshape(shape)


def unpack_texts(name: str, count: int, data: bytes) -> np.ndarray:
    """So many texts, each behind its length; raises InputError for other bytes."""
    found, at = np.empty(count, np.object_), 0
    for number in range(count):
        size = int.from_bytes(data[at : at + 4], "little")
        found[number], at = data[at + 4 : at + 4 + size], at + 4 + size
        if at > len(data):
            raise InputError(f"input {name}: a text is longer than the content that it lies in")
    if at != len(data):
        raise InputError(f"input {name}: {len(data) - at} bytes lie behind its texts")
    return found


def _add_outputs(message: Message, served: Served, fresh: Message) -> None:
    names = [output.name for output in message.outputs]
    if unknown := sorted(set(names) - served.outputs):
        raise InputError(f"output {unknown[0][:63]!r} is unknown; there are {', '.join(sorted(served.outputs))}")
    if len(set(names)) != len(names):
        raise InputError("an output is asked for twice")
    for output in message.outputs:
        if extra := sorted(set(output.parameters) - {"binary_data"}):
            raise InputError(f"output {output.name}: parameter {extra[0][:63]!r} is unknown")
        fresh.outputs.add(name=output.name)


_OF_TRITON: dict[re.Pattern[str], tuple[str, ...]] = {
    re.compile(r"timeout|priority"): ("int64_param", "uint64_param"),
    re.compile(r"sequence_id"): ("int64_param", "uint64_param", "string_param"),
    re.compile(r"sequence_start|sequence_end|binary_data_output|triton_enable_empty_final_response"): ("bool_param",),
}
"""Triton's own parameters, and what they are."""


def _add_parameters(message: Message, served: Served, fresh: Message) -> None:
    if len(message.parameters) > MAX_PARAMETERS:
        raise InputError(f"{len(message.parameters)} parameters: {MAX_PARAMETERS} at most")
    for name in sorted(message.parameters):
        value = message.parameters[name]
        kind, kinds = value.WhichOneof("parameter_choice"), _kinds(name)
        if kinds is None:
            known = ", ".join(served.inputs)
            raise InputError(f"parameter {name[:63]!r} is unknown; settings are inputs: {known}")
        given = None if kind is None else getattr(value, kind)
        if kind not in kinds or (isinstance(given, int) and given < 0) or (name == "sequence_id" and not _short(given)):
            meant = "a number of microseconds" if name == "timeout" else kinds[0].removesuffix("_param")
            raise InputError(f"{name} {given!r} is not {meant}"[:300])
        fresh.parameters[name].CopyFrom(value)


def _kinds(name: str) -> tuple[str, ...] | None:
    return next((kinds for names, kinds in _OF_TRITON.items() if names.fullmatch(name)), None)


def _short(value: Any) -> bool:
    return not isinstance(value, str) or len(value.encode()) <= MAX_ID_BYTES
