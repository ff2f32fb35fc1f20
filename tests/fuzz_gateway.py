"""`python tests/fuzz_gateway.py grpc|infer|generate CORPUS… -runs=N`: what strangers may send, changed at random.

The gateway's decoders, led by what of them each input reaches. A request is refused by InputError, or what is made of
it obeys the contract; anything else is a finding, whose input belongs into the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris
import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

with atheris.instrument_imports(include=["tav_opt.serving.gateway", "tav_opt.contract"]):
    from tav_opt import contract
    from tav_opt.config import InputError
    from tav_opt.serving.gateway import json_tensors, rules

MODELS = (contract.STREAM_MODEL, contract.UNARY_MODEL, contract.CLIPS_MODEL)


def over_grpc(data: bytes) -> rules.Message:
    return rules.checked(rules.parsed(data))


def as_infer(data: bytes) -> rules.Message:
    """The first line: the model's number, and how long the JSON before the binary data is."""
    head, _, body = data.partition(b"\n")
    length = head[1:].decode("latin-1") or None
    message, _ = json_tensors.infer_request(MODELS[head[:1] == b"1"], "", body, length)
    return rules.checked(message)


def as_generate(data: bytes) -> rules.Message:
    head, _, body = data.partition(b"\n")
    return rules.checked(json_tensors.generate_request(MODELS[len(head) % 3], "", body))


DECODERS = {"grpc": over_grpc, "infer": as_infer, "generate": as_generate}


def look(kind: str, data: bytes) -> bool:
    """Whether a request passes; an AssertionError, or any other error, is a finding."""
    try:
        message = DECODERS[kind](data)
    except InputError as refused:
        assert len(str(refused)) < 1000 and "\n" not in str(refused)
        return False
    obeys(message)
    return True


def obeys(message: rules.Message) -> None:
    """What Triton will get is what it takes it for: by another reader than ours."""
    assert message.model_name in MODELS and rules.Message.FromString(message.SerializeToString()) == message
    assert len(message.inputs) == len(message.raw_input_contents)
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        count = 1
        for size in tensor.shape:
            assert size > 0
            count *= size
        if tensor.datatype == "BYTES":
            assert len(deserialize_bytes_tensor(raw)) == count
        else:
            assert np.dtype(triton_to_np_dtype(tensor.datatype)).itemsize * count == len(raw)


def main() -> None:
    kind, *rest = sys.argv[1:]
    atheris.Setup([sys.argv[0], *rest], lambda data: look(kind, data))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
