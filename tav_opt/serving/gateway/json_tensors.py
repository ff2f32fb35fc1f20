"""KServe v2 over HTTP, with its binary extension, and Triton's `generate`, as messages and back."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from tritonclient.grpc import service_pb2

from tav_opt.config import InputError
from tav_opt.contract import NUMPY
from tav_opt.serving.gateway import rules
from tav_opt.serving.gateway.rules import MAX_REQUEST_BYTES, MAX_SPELT_BYTES, Message, Served

MAX_DEPTH = 16
"""Of nested lists in a request; a source's frames have four."""
HEADER_LENGTH = "inference-header-content-length"
"""Of a body whose JSON has binary data behind it."""
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_WINDOWS = {"gzip": 31, "deflate": 15}
Response: TypeAlias = service_pb2.ModelInferResponse


def unpacked(body: bytes, encoding: str) -> bytes:
    """A body as it was before it was packed; raises InputError for one that grows too large, or is damaged."""
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOWS:
        raise InputError(f"Content-Encoding {encoding[:20]!r} is not {' or '.join(_WINDOWS)}")
    unpacking = zlib.decompressobj(wbits=_WINDOWS[encoding])
    try:
        whole = unpacking.decompress(body, MAX_REQUEST_BYTES)
    except zlib.error as error:
        raise InputError(f"the body is no {encoding}: {error}") from None
    if unpacking.unconsumed_tail:
        raise InputError(f"the body is more than {MAX_REQUEST_BYTES} bytes when it is unpacked")
    if not unpacking.eof:
        raise InputError(f"the body is no whole {encoding}")
    return whole


def loads(text: bytes) -> dict[str, Any]:
    """A JSON object; raises InputError for anything else, names that come twice, and lists in lists without end."""
    if len(text) > MAX_SPELT_BYTES:
        raise InputError(
            f"the body's JSON has {len(text)} bytes, {MAX_SPELT_BYTES} at most: send frames as binary data"
        )
    try:
        found = json.loads(text.decode() or "{}", object_pairs_hook=_once, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise InputError("the body is not UTF-8") from None
    except RecursionError:
        raise InputError("the body's JSON is nested too deep") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise InputError("the body is no JSON object")
    if _ESCAPED_SURROGATE.search(text):
        _check_text(found)
    return found


def _check_text(found: dict[str, Any]) -> None:
    """Raises InputError where a text holds half a letter, which has no bytes."""
    try:
        compact(found)
    except UnicodeEncodeError:
        raise InputError("a text in the body's JSON is not Unicode: it holds half of a surrogate pair") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError("a name comes twice in the body's JSON")
    return found


def _no_number(name: str) -> Any:
    raise InputError(f"{name} is no JSON")


def infer_request(name: str, version: str, body: bytes, header_length: str | None) -> tuple[Message, dict[str, bool]]:
    """The body of `infer` → a message, and by their names the outputs that shall be binary ("" stands for all others).

    Raises InputError, and rules.NotFound.
    """
    served = rules.model(name, version)
    end = len(body) if header_length is None else _length(header_length, len(body))
    found, rest = loads(body[:end]), body[end:]
    _only(found, ("id", "parameters", "inputs", "outputs"), "the body")
    message = Message(model_name=name, model_version=version, id=_text(found, "id"))
    inputs = _objects(found, "inputs")
    if len(inputs) > len(served.inputs):  # each cuts its part off what is binary
        raise InputError(f"{len(inputs)} inputs: {len(served.inputs)} at most")
    for tensor in inputs:
        _only(tensor, ("name", "datatype", "shape", "data", "parameters"), "an input")
        rest = _add_input(message, served, tensor, rest)
    if rest:
        raise InputError(f"{len(rest)} bytes lie behind the inputs' binary data")
    binary = {"": False}
    for output in _objects(found, "outputs"):
        _only(output, ("name", "parameters"), "an output")
        given = _object(output, "parameters")
        _only(given, ("binary_data",), "an output's parameters")
        message.outputs.add(name=_text(output, "name"))
        binary |= {_text(output, "name"): _bool(given, "binary_data")} if "binary_data" in given else {}
    parameters = _object(found, "parameters")
    binary[""] = _bool(parameters, "binary_data_output")
    add_parameters(message, parameters)
    return rules.with_id(message), binary


def generate_request(name: str, version: str, body: bytes) -> Message:
    """The body of `generate`: inputs by their names, a value or a list each; what else there is, are parameters.

    Raises InputError, and rules.NotFound.
    """
    served, found = rules.model(name, version), loads(body)
    message = Message(model_name=name, model_version=version, id=_text(found, "id"))
    found = {key: value for key, value in found.items() if key != "id"}
    found |= _object(found, "parameters")
    found.pop("parameters", None)
    for key, value in found.items():
        if key in served.inputs:
            tensor = served.inputs[key]
            values, shape = flat(value if isinstance(value, list) else [value], key)
            rules.check_shape(tensor, shape)
            message.inputs.add(name=key, datatype=rules.wire(tensor), shape=shape)
            message.raw_input_contents.append(_packed(rules.wire(tensor), values, key))
    add_parameters(message, {key: value for key, value in found.items() if key not in served.inputs})
    return rules.with_id(message)


def _add_input(message: Message, served: Served, tensor: dict[str, Any], rest: bytes) -> bytes:
    """Adds one input, and returns the binary data that the next ones have."""
    name, datatype, shape = _text(tensor, "name"), _text(tensor, "datatype"), tensor.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DEPTH or not all(map(_is_size, shape)):
        raise InputError(f"input {name[:63]!r}: its shape is no list of sizes")
    if name not in served.inputs:
        raise InputError(f"input {name[:63]!r} is unknown; there are {', '.join(served.inputs)}")
    rules.check_shape(served.inputs[name], shape)
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    given = _object(tensor, "parameters")
    _only(given, ("binary_data_size",), f"input {name}'s parameters")
    if "binary_data_size" not in given:
        values, _ = flat(tensor.get("data"), name)
        if len(values) != math.prod(shape):
            raise InputError(f"input {name} of shape {shape[:8]} has {len(values)} values")
        message.raw_input_contents.append(_packed(datatype, values, name))
        return rest
    size = given["binary_data_size"]
    if type(size) is not int or not 0 <= size <= len(rest) or "data" in tensor:
        raise InputError(f"input {name}: binary_data_size {str(size)[:20]} is not that of its data")
    message.raw_input_contents.append(rest[:size])
    return rest[size:]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def flat(data: Any, name: str) -> tuple[list[Any], list[int]]:
    """Lists in lists → their values in one, and the shape; raises InputError for ragged ones."""
    if not isinstance(data, list):
        raise InputError(f"input {name} has no list of values")
    shape = [len(data)]
    while data and all(isinstance(part, list) for part in data):
        if len({len(part) for part in data}) > 1 or len(shape) == MAX_DEPTH:
            raise InputError(f"input {name}: its lists do not make a tensor")
        shape.append(len(data[0]))
        data = [value for part in data for value in part]
    return data, shape


def _packed(datatype: str, values: list[Any], name: str) -> bytes:
    """Raises InputError for values that JSON has in another kind than the datatype's."""
    kinds: dict[str, Any] = {"BYTES": str, "BOOL": bool, "FP32": (int, float)}
    kind = kinds.get(datatype, int)
    if datatype not in ("BYTES", *NUMPY) or datatype == "STRING":
        raise InputError(f"input {name}: datatype {datatype[:20]!r} is unknown")
    for value in values:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"input {name}: {str(value)[:63]!r} is no {datatype}")
    return rules.pack(datatype, [value.encode() for value in values] if datatype == "BYTES" else values, name)


def add_parameters(message: Message, parameters: Mapping[str, Any]) -> None:
    """Raises InputError for a value that no parameter can have."""
    for name, value in parameters.items():
        match value:
            case bool():
                message.parameters[name].bool_param = value
            case int() if -(1 << 63) <= value < 1 << 63:
                message.parameters[name].int64_param = value
            case float():
                message.parameters[name].double_param = value
            case str():
                message.parameters[name].string_param = value
            case _:
                raise InputError(f"parameter {name[:63]!r} is unknown, and has no value that one could have")


def infer_response(data: bytes, binary: Mapping[str, bool]) -> tuple[bytes, dict[str, str]]:
    """A ModelInferResponse as the body of `infer`'s answer, and the headers that go with it."""
    response = Response.FromString(data)
    outputs, behind = [], []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        told: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if binary.get(output.name, binary[""]):
            told["parameters"] = {"binary_data_size": len(raw)}
            behind.append(raw)
        else:
            told["data"] = values_of(output, raw)
        outputs.append(told)
    head = {"id": response.id} if response.id else {}
    head |= {"model_name": response.model_name, "model_version": response.model_version, "outputs": outputs}
    text = compact(head)
    if not behind:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return b"".join([text, *behind]), headers


def compact(value: Any) -> bytes:
    """JSON as Triton writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def generated(data: bytes) -> dict[str, Any]:
    """A ModelInferResponse as `generate` has it: outputs by their names, one value without its list."""
    response = Response.FromString(data)
    found: dict[str, Any] = {"id": response.id} if response.id else {}
    found |= {"model_name": response.model_name, "model_version": response.model_version}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        values = values_of(output, raw)
        found[output.name] = values[0] if len(values) == 1 else values
    return found


def values_of(output: Any, raw: bytes) -> list[Any]:
    """An output's values as JSON has them; texts that are not UTF-8 come with replacement characters."""
    count = math.prod(output.shape)
    if output.datatype == "BYTES":
        return [text.decode(errors="replace") for text in rules.unpack_texts(output.name, count, raw)]
    return np.frombuffer(raw, rules.numpy_of(output.datatype)).tolist()


def _length(given: str, most: int) -> int:
    if not given.isascii() or not given.isdigit() or len(given) > 12 or int(given) > most:
        raise InputError(f"{HEADER_LENGTH} {given[:20]!r} is not a length within the body")
    return int(given)


def _only(found: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(found) - {*names}):
        raise InputError(f"{unknown[0][:63]!r} is unknown in {where}; there are {', '.join(names)}")


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{name} {str(value)[:63]!r} is no text")
    return value


def _bool(found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name} {str(value)[:63]!r} is not true or false")
    return value


def _object(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f"{name} is no JSON object")
    return value


def _objects(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = found.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{name} is no list of JSON objects")
    return value
