"""What the gateway answers over HTTP, as an OpenAPI document made of the contract."""

from __future__ import annotations

from typing import Any

from tav_opt import __version__
from tav_opt.contract import ServedTensor
from tav_opt.serving.gateway.rules import MAX_ID_BYTES, MODELS, Served

_KINDS = {"STRING": "string", "BOOL": "boolean", "FP32": "number"}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def document() -> dict[str, Any]:
    """Every route of the HTTP face, its bodies and its statuses."""
    paths: dict[str, Any] = {
        "/v2": {"get": _answered("serverMetadata", {"name": _TEXT, "version": _TEXT, "extensions": _LIST})},
        **{f"/v2/health/{kind}": {"get": _bare(f"server{kind.title()}")} for kind in ("live", "ready")},
    }
    for name, served in MODELS.items():
        path = f"/v2/models/{name}"
        tensors = {"name": _TEXT, "versions": _LIST, "inputs": _LIST, "outputs": _LIST}
        paths[path] = {"get": _answered(f"{name}_metadata", tensors)}
        paths[f"{path}/ready"] = {"get": _bare(f"{name}_ready")}
        paths[f"{path}/infer"] = {"post": _asked(f"{name}_infer", _infer(served), {"outputs": _LIST})}
        paths[f"{path}/generate"] = {"post": _asked(f"{name}_generate", _generate(served), {"model_name": _TEXT})}
        streamed = _asked(f"{name}_generate_stream", _generate(served), {})
        streamed["responses"]["200"] = {"description": "events", "content": {"text/event-stream": {}}}
        paths[f"{path}/generate_stream"] = {"post": streamed}
    told = {"title": "tav-opt", "version": __version__, "description": "KServe v2, and Triton's generate."}
    return {"openapi": "3.1.0", "info": told, "paths": paths}


_TEXT = {"type": "string"}
_LIST = {"type": "array"}


def _object(properties: dict[str, Any], required: list[str], *, closed: bool) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": not closed}


def _answered(operation: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = _object(properties, list(properties), closed=False)
    content = {"application/json": {"schema": schema}}
    refused = {"description": "refused", "content": {"application/json": {"schema": _ERROR}}}
    return {"operationId": operation, "responses": {"200": {"description": "told", "content": content}, "4XX": refused}}


def _bare(operation: str) -> dict[str, Any]:
    return {"operationId": operation, "responses": {"200": {"description": "yes"}, "400": {"description": "no"}}}


def _asked(operation: str, body: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
    return {
        **_answered(operation, properties),
        "requestBody": {"required": bool(body["required"]), "content": {"application/json": {"schema": body}}},
    }


def _generate(served: Served) -> dict[str, Any]:
    """Inputs by their names."""
    inputs = {name: _value(tensor) for name, tensor in served.inputs.items()}
    required = [name for name, tensor in served.inputs.items() if not tensor.optional]
    return _object({"id": _id(), "timeout": _microseconds(), **inputs}, required, closed=True)


def _infer(served: Served) -> dict[str, Any]:
    tensor = _object(
        {
            "name": {"enum": list(served.inputs)},
            "datatype": _TEXT,
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            "data": _LIST,
        },
        ["name", "datatype", "shape", "data"],
        closed=True,
    )
    asked = _object({"name": {"enum": sorted(served.outputs)}}, ["name"], closed=True)
    lists = {name: {"type": "array", "items": kind} for name, kind in (("inputs", tensor), ("outputs", asked))}
    needed = [] if all(tensor.optional for tensor in served.inputs.values()) else ["inputs"]
    return _object({"id": _id(), "parameters": {"type": "object"}, **lists}, needed, closed=True)


def _value(tensor: ServedTensor) -> dict[str, Any]:
    if len(tensor.shape) > 1:
        return _LIST
    kind = {"type": _KINDS.get(tensor.dtype, "integer")}
    return {"anyOf": [kind, {"type": "array", "items": kind}]} if tensor.shape == (-1,) else kind


def _id() -> dict[str, Any]:
    return {"type": "string", "maxLength": MAX_ID_BYTES}


def _microseconds() -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
