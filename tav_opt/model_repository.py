"""The files of the served model beside the exported clips: its configuration, made from the contract, and model.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tav_opt.contract import STREAM_INPUTS, STREAM_MODEL, STREAM_OUTPUTS, ServedTensor
from tav_opt.files import whole

MODEL_PY = '''"""Runs inside the Python backend of NVIDIA Triton Inference Server."""

from tav_opt.serving.worker import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def config_pbtxt() -> str:
    """The configuration of the streaming model: decoupled, one edit at a time, the others wait in Triton's queue."""
    return f"""# Generated from tav_opt/contract.py by tav_opt/model_repository.py.
name: "{STREAM_MODEL}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
{_tensors(STREAM_INPUTS)}
]
output [
{_tensors(STREAM_OUTPUTS)}
]
instance_group [{{ kind: KIND_CPU, count: 1 }}]
"""


def _tensors(tensors: Iterable[ServedTensor]) -> str:
    return ",\n".join(_tensor(tensor) for tensor in tensors)


def _tensor(tensor: ServedTensor) -> str:
    optional = ", optional: true" if tensor.optional else ""
    shape = ", ".join(map(str, tensor.shape))
    return f'  {{ name: "{tensor.name}", data_type: TYPE_{tensor.dtype}, dims: [{shape}]{optional} }}'


def write_model_files(repository: Path) -> None:
    """Writes `config.pbtxt` and `1/model.py` of the served model into a model repository, where they differ."""
    model = repository / STREAM_MODEL
    for path, text in ((model / "config.pbtxt", config_pbtxt()), (model / "1" / "model.py", MODEL_PY)):
        if not path.is_file() or path.read_text() != text:
            with whole(path) as temporary:
                temporary.write_text(text)
