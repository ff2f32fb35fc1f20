"""Small things that are large once they are read: refused before they are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from served import raw, request

from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL, UNARY_INPUTS, UNARY_MODEL, to_tensors
from tav_opt.serving.gateway import json_tensors, rules
from tav_opt.serving.gateway.rules import MAX_FIELDS, MAX_SPELT_BYTES, Message, checked, parsed

GOOD = raw(to_tensors("first", EditConfig(prompts=("a panda is skiing",))))
MANY = 1 << 20


def empty_fields(name: str) -> bytes:
    """A field of a request, a million times, two bytes each."""
    return bytes([Message.DESCRIPTOR.fields_by_name[name].number << 3 | 2, 0]) * MANY


def typed(field: str, datatype: str, values: list[object]) -> bytes:
    message = Message(model_name=UNARY_MODEL)
    tensor = message.inputs.add(name="clip", datatype=datatype, shape=[1])
    getattr(tensor.contents, field).extend(values)
    return message.SerializeToString()


def long_shape() -> bytes:
    message = request(UNARY_MODEL, GOOD)
    message.inputs[0].shape.extend([1] * MANY)
    return message.SerializeToString()


def generate(**values: object) -> Message:
    return checked(json_tensors.generate_request(UNARY_MODEL, "", json.dumps(values).encode()))


LARGE: dict[str, tuple[Callable[[], object], str]] = {
    "inputs": (lambda: parsed(empty_fields("inputs")), "more than 128"),
    "outputs": (lambda: parsed(empty_fields("outputs")), "more than 128"),
    "parameters": (lambda: parsed(empty_fields("parameters")), "more than 128"),
    "contents": (lambda: parsed(empty_fields("raw_input_contents")), "more than 128"),
    "texts": (lambda: checked(parsed(typed("bytes_contents", "BYTES", [b""] * MANY))), "has 1048576 values"),
    "sizes": (lambda: checked(parsed(long_shape())), "has shape [1, 1, 1, 1, 1, 1, 1, 1], not [1]"),
    "spelt": (lambda: parsed(typed("bytes_contents", "BYTES", [bytes(MAX_SPELT_BYTES)])), "that are not raw"),
    "json": (lambda: generate(clip="x" * MAX_SPELT_BYTES), "send frames as binary data"),
    "values": (lambda: generate(clip="first", prompt="x", seed=[0] * MANY), "has shape [1048576], not [1]"),
    "prompts": (lambda: generate(clip="first", prompt=["x"] * MANY), "has 1048576 texts"),
}


@pytest.mark.parametrize(("ask", "told"), LARGE.values(), ids=LARGE)
def test_much_of_little_is_refused(ask, told):
    with pytest.raises(InputError) as caught:
        ask()
    assert told in str(caught.value)


def test_binary_data_is_not_cut_for_more_inputs_than_there_are():
    """Each would copy all that lies behind it."""
    one = {"name": "seed", "datatype": "UINT64", "shape": [1], "parameters": {"binary_data_size": 8}}
    count = len(UNARY_INPUTS) + 1
    head = json.dumps({"inputs": [one] * count}).encode()
    with pytest.raises(InputError, match=f"{count} inputs: {len(UNARY_INPUTS)} at most"):
        json_tensors.infer_request(UNARY_MODEL, "", head + bytes(8 * count), str(len(head)))


def test_a_whole_request_has_room():
    """Every input, output and parameter there is, as many prompts as may be, and raw data as large as it gets."""
    message = request(STREAM_MODEL, GOOD)
    for name in sorted(set(rules.MODELS[STREAM_MODEL].inputs) - set(GOOD)):
        message.inputs.add(name=name)
        message.raw_input_contents.append(b"")
    for name in rules.MODELS[STREAM_MODEL].outputs:
        message.outputs.add(name=name)
    for number in range(rules.MAX_PARAMETERS):
        message.parameters[f"{number}"].int64_param = 1
    message.raw_input_contents[-1] = bytes(2 * MAX_SPELT_BYTES)
    message.id = message.model_version = "1"
    assert parsed(message.SerializeToString()) == message
    assert sum(1 for _ in message.inputs) * 2 + len(message.outputs) + rules.MAX_PARAMETERS + 3 < MAX_FIELDS


def test_fields_that_a_request_has_not_are_not_overlooked():
    """By a message type of our own, which has them."""
    file = descriptor_pb2.FileDescriptorProto(name="other", package="other", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"model_name": (1, field.TYPE_STRING), "far": (300, field.TYPE_STRING), "wrong": (3, field.TYPE_FIXED64)}
    other = file.message_type.add(name="Other")
    for name, (number, kind) in kinds.items():
        other.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("other.Other"))
    assert parsed(kind(model_name="x" * 300).SerializeToString()).model_name == "x" * 300
    for values in ({"far": "x"}, {"wrong": 7}):
        with pytest.raises(InputError, match="no ModelInferRequest"):
            parsed(kind(model_name="x", **values).SerializeToString())
    for cut in (b"\x0a", b"\x0a\x05x", b"\x0a" + b"\xff" * 11, b"\x80" * 20):
        with pytest.raises(InputError, match="no ModelInferRequest"):
            parsed(cut)


READ = """
import resource
from tav_opt.config import InputError
from tav_opt.serving.gateway.rules import parsed
data = b"\\x2a\\0" * (16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    parsed(data)
except InputError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_thirty_two_million_bytes_take_no_more():
    """They took 1.4 GiB and six seconds; a whole request of them 11 GiB."""
    ran = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True)
    assert ran.returncode == 0 and int(ran.stdout) < 64, ran.stdout + ran.stderr
