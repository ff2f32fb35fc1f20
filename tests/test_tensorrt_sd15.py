"""Stable Diffusion 1.5's UNet with random weights at 4 frames of 128²: exported, in fp16, built. Takes some 10 GB."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from exported import untuned_graph

from tav_opt.engines import tensorrt_library
from tav_opt.export import graphs, half, layers, parity
from tav_opt.export.rounding import rounded
from tav_opt.export.tensorrt import builder, estimate

pytestmark = pytest.mark.full
pytest.importorskip("polygraphy")
pytest.importorskip("tensorrt_rtx")


def sd15() -> graphs.Graph:
    """diffusers' defaults are Stable Diffusion's but for the width of its text and its heads."""
    torch.manual_seed(0)
    image = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert round(sum(p.numel() for p in image.parameters()) / 1e6) == 860
    return untuned_graph(image, (4, 4, 16, 16))


def told(what: str, start: float) -> float:
    """Says how long a stage took and the most memory so far (shown by pytest -s)."""
    now = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {now - start:.1f} s, peak {peak:.1f} GiB", flush=True)
    return now


def test_sd15(tmp_path: Path) -> None:
    rtx = tensorrt_library.load("tensorrt-rtx")
    start = time.perf_counter()
    graph = sd15()
    start = told("made", start)
    path = graphs.write(graph, tmp_path)
    start = told("exported", start)
    assert len(graph.values or {}) == 144

    found = parity.check(graph, parity.in_onnxruntime(path, graph.spec))
    start = told(f"fp32 error {found.error:.1e} in onnxruntime", start)

    half_path = half.write(path, tmp_path / "unet.half.onnx", {value.name for value in graph.spec.values.values()})
    start = told("in fp16", start)
    onnx.save(rounded(half.fixed(half_path, 2, "standard")), tmp_path / "unet-2.onnx")
    halves = parity.measure_half(
        graph, [layers.onnxruntime_runner(tmp_path / "unet-2.onnx", "onnxruntime")], parity.feeds(graph, 2)
    )
    start = told(f"fp16 error {halves['onnxruntime'].error:.1e} in onnxruntime", start)
    parity.check_half("unet", halves)

    plugin = half.fixed(half_path, 2, "plugin")
    assert sum(node.domain == "tav_opt" for node in plugin.graph.node) == 16
    parsed = builder.parse(rtx, half.fixed(half_path, 2, "standard"), half_path)
    weights = Path(f"{half_path}.data").stat().st_size
    need = estimate.needed(parsed, weights)
    start = told(f"parsed: up to {need.total / 2**30:.2f} GiB of GPU memory", start)
    engine, _ = builder.build(parsed, card="sm89")
    told(f"built: {len(engine) / 2**30:.2f} GiB", start)
    assert weights < len(engine) < 1.2 * weights
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < estimate.host_bytes(path.with_name("unet.onnx.data")), "the estimate of host memory is too low"
