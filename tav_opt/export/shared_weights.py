"""One file of weights for several graphs: what a graph has in common with one that is there, it reads from its file."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from tav_opt.files import whole

_ALIGNED = 4096
"""Where weights begin in a file, so that a runtime can map them: pages."""


def share(path: Path, other: Path) -> None:
    """Makes a graph read from `other`'s file whatever weights both have, byte for byte; both lie in one folder.

    The exporter renames and transposes weights, so that content alone tells which they are. The graph's own file keeps
    the rest, and is gone where there is none; nothing of `other` is written.
    """
    model = onnx.load(path, load_external_data=False)
    own = path.with_name(f"{path.name}.data")
    with _mapped(other.with_name(f"{other.name}.data")) as content:
        known = {_hash(content, info): info for _, info in _external(onnx.load(other, load_external_data=False))}
    rest = []
    with _mapped(own) as content:
        for tensor, info in _external(model):
            found = known.get(_hash(content, info))
            if found is None:
                rest.append((tensor, content[info.offset : info.offset + info.length]))
            else:
                _refer(tensor, found.location, found.offset, found.length)
    with whole(own) as temporary, temporary.open("wb") as file:
        for tensor, data in rest:
            file.seek(-file.tell() % _ALIGNED, 1)
            _refer(tensor, own.name, file.tell(), len(data))
            file.write(data)
    if not rest:
        own.unlink()
    with whole(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _external(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, ExternalDataInfo]]:
    """The weights of a graph that lie in a file, with where."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor, _placed(tensor)


def _placed(tensor: TensorProto) -> ExternalDataInfo:
    info = ExternalDataInfo(tensor)
    info.offset = info.offset or 0
    assert info.length, f"{tensor.name}: the exporter writes every length"
    return info


def _refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    tensor.raw_data = b"\0"  # which onnx asks for, and takes for nothing
    set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")


def _hash(content: mmap.mmap | bytes, info: ExternalDataInfo) -> bytes:
    with memoryview(content) as view:
        return sha256(view[info.offset : info.offset + info.length]).digest()


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    if not path.exists() or not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content
