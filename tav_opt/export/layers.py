"""Polygraphy: the same inputs through eager PyTorch, onnxruntime and TensorRT, and through every layer of a graph."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tav_opt.config import InputError
from tav_opt.engines.onnxruntime import session
from tav_opt.engines.tensorrt_library import Library
from tav_opt.export.tensorrt.builder import Network

Feed = Mapping[str, np.ndarray]
Runner = Any
"""A runner of Polygraphy."""

_MASKED = 3e38
"""Masks hold the lowest float32, which has no fp16: where it stands, nothing is compared."""


def _polygraphy() -> Any:
    try:
        import polygraphy
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise InputError("polygraphy is not installed: pip install 'tav-opt[tensorrt]', or [tensorrt-rtx]") from None
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return polygraphy


def onnxruntime_runner(path: Path, name: str) -> Runner:
    """Runs a graph in onnxruntime on the CPU."""
    _polygraphy()
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(session(path, torch.device("cpu")), name=name)


def eager_runner(call: Callable[[Feed], Feed], like: Feed) -> Runner:
    """Runs a function of inputs named and typed as in `like` that gives outputs by name."""
    _polygraphy()
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    class Eager(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for name, array in like.items():
                metadata.add(name, array.dtype, array.shape)
            return metadata

        def infer_impl(self, feed_dict: Feed) -> Any:
            start = time.perf_counter()
            found = OrderedDict((name, np.ascontiguousarray(output)) for name, output in call(feed_dict).items())
            self.inference_time = time.perf_counter() - start  # Polygraphy adds them up
            return found

    return Eager(name="eager")


def tensorrt_runner(library: Library, engine: Path) -> Runner:
    """Runs an engine on the GPU that it was built for. Never run so far."""
    backend = _tensorrt_backend(library)
    return backend.TrtRunner(backend.EngineFromBytes(engine.read_bytes()), name=library.target)


def _tensorrt_backend(library: Library) -> Any:
    _polygraphy().config.USE_TENSORRT_RTX = library.target == "tensorrt-rtx"  # read when it first imports either
    from polygraphy.backend import trt

    return trt


def mark_all(parsed: Network, model: onnx.ModelProto) -> None:
    """Makes an output of every tensor of the parsed network that has its name from the ONNX graph, in place.

    Constants stay inside, and so does what the parser puts between: it has names that no other graph knows.
    """
    known = {name for node in model.graph.node for name in node.output}
    constant = parsed.library.trt.LayerType.CONSTANT
    tensors = [x.get_output(i) for x in parsed.layers if x.type != constant for i in range(x.num_outputs)]
    names = [tensor.name for tensor in tensors if tensor is not None and tensor.name in known]
    _tensorrt_backend(parsed.library).modify_network_outputs((parsed.builder, parsed.network), outputs=names)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one tensor is from the reference, by the largest value of either sign of the reference."""

    tensor: str
    error: float
    largest: float


def compare(runners: Sequence[Runner], feeds: Sequence[Feed]) -> dict[str, list[Difference]]:
    """Runs all runners on the same feeds; by runner but the first, its largest differences to the first, in order.

    The error of a tensor is its largest absolute difference over the reference's largest value, or over 1 where that
    is smaller; infinite where a value is not finite.
    """
    _polygraphy()
    from polygraphy.comparator import Comparator

    results = Comparator.run(list(runners), data_loader=list(feeds), warm_up=0)
    (_, reference), *others = results
    return {name: _differences(reference, iterations) for name, iterations in others}


def _differences(reference: Sequence[Any], found: Sequence[Any]) -> list[Difference]:
    from polygraphy.comparator import CompareFunc

    worst: dict[str, Difference] = {}
    measure = CompareFunc.simple(check_error_stat="max", rtol=0, atol=float("inf"))
    for expected, got in zip(reference, found, strict=True):
        for tensor, result in measure(expected, got).items():
            largest = float(np.abs(np.asarray(expected[tensor], dtype=np.float64)).max(initial=0))
            error = float(result.max_absdiff) / max(largest, 1.0)
            error = error if np.isfinite(error) else float("inf")
            if tensor not in worst or error > worst[tensor].error:
                worst[tensor] = Difference(tensor=tensor, error=error, largest=largest)
    return list(worst.values())


def by_layer(reference: Runner, other: Runner, feed: Feed) -> list[Difference]:
    """Every tensor that two runners give by the same name, in the order in which the reference makes them.

    Of runners whose every tensor is an output; memory for all of them is needed at once.
    """
    outputs = [_fed(runner, feed) for runner in (reference, other)]
    shared = [name for name in outputs[0] if name in outputs[1]]
    return [_difference(name, outputs[0][name], outputs[1][name]) for name in shared]


def _fed(runner: Runner, feed: Feed) -> dict[str, np.ndarray]:
    """One run, each input cast to what the runner takes."""
    with runner:
        taken = runner.get_input_metadata(use_numpy_dtypes=False)
        return dict(runner.infer({name: feed[name].astype(taken[name].dtype.numpy()) for name in taken}))


def _difference(name: str, reference: np.ndarray, found: np.ndarray) -> Difference:
    expected, got = (np.asarray(x, dtype=np.float64) for x in (reference, found))
    finite = np.abs(expected) < _MASKED
    if expected.size == 0 or not finite.any():
        return Difference(tensor=name, error=0.0, largest=0.0)
    largest = float(np.abs(expected[finite]).max())
    error = float(np.abs(expected - got)[finite].max()) / max(largest, 1e-12)
    return Difference(tensor=name, error=error if np.isfinite(error) else float("inf"), largest=largest)


def marked_runner(path: Path, folder: Path) -> Runner:
    """Runs a graph in onnxruntime with every tensor an output; the copy that is marked lies in `folder`."""
    _polygraphy()
    from polygraphy import constants
    from polygraphy.backend.onnx import modify_outputs

    marked = folder / f"{path.stem}-layers.onnx"
    onnx.save(modify_outputs(onnx.load(path, load_external_data=False), outputs=constants.MARK_ALL), marked)
    return onnxruntime_runner(marked, "onnxruntime")
