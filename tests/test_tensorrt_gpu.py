"""On a GPU: the plugin's PTX as TensorRT launches it, fp16 graphs in onnxruntime-gpu, engines built and run."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import truth

from tav_opt.config import EditConfig, InputError
from tav_opt.engines.tensorrt_library import Target
from tav_opt.kernels.sparse_causal import sparse_causal_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(("n", "width"), [(4096, 40), (1024, 80), (256, 160), (64, 160), (100, 40)])
def test_the_plugins_ptx_by_the_driver(n: int, width: int) -> None:
    """Entry, grid, block, shared memory and scalars as `aot_impl` returns them; no more shared memory is asked for."""
    from tav_opt.export.tensorrt.plugin_kernel import plugin_kernel
    from tav_opt.kernels.tiles import architecture

    frames, heads = 3, 2
    torch.manual_seed(0)
    q, k, v = torch.randn(3, frames, n, heads * width, device="cuda", dtype=torch.float16)
    out = torch.full_like(q, float("nan"))
    kernel = plugin_kernel(q.shape, q.dtype, frames, heads, architecture(q))
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(kernel.ptx.encode())) == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry.encode()) == 0
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out)]
    values = [*pointers[:3], *(ctypes.c_int32(x) for x in kernel.scalars), pointers[3]]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    assert cuda.cuLaunchKernel(function, *kernel.grid, *kernel.block, kernel.shared, None, arguments, None) == 0
    torch.cuda.synchronize()
    q, k, v = (x.cpu() for x in (q, k, v))
    difference = (out.cpu() - truth(q, k, v, frames, heads, sparse_causal_attention)).abs()
    allowed = torch.finfo(q.dtype).eps * truth(q, k, v.abs(), frames, heads, sparse_causal_attention) + 1e-5
    assert (difference < allowed).all(), f"{(difference / allowed).max():.2f} × what rounding explains"


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    pytest.importorskip("diffusers")
    from exported import export_once

    return export_once(golden, tmp_path_factory.getbasetemp())


def test_fp16_graphs_in_onnxruntime_on_the_gpu(exported, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Real fp16 kernels against eager PyTorch in fp32, within the tolerances of export."""
    import onnx

    from tav_opt import checkpoint, models
    from tav_opt.engines.onnxruntime import session, why_not
    from tav_opt.export import graphs, half, parity

    tuned = checkpoint.load(exported.checkpoint)
    if reason := why_not(exported.base, tuned.info, torch.device("cuda")):
        pytest.skip(reason)
    sd = models.load(tuned.info.base)
    values = {name: value.float() for name, value in tuned.values.items()}
    models.put_values(sd.unet, values)
    for graph in graphs.graphs(sd, values, tuned.source_latents.shape[1:]):
        names = {value.name for value in graph.spec.values.values()}
        path = half.write(exported.base / f"{graph.name}.onnx", tmp_path / f"{graph.name}.half.onnx", names)
        onnx.save(half.fixed(path, 2, "onnxruntime"), tmp_path / f"{graph.name}-2.onnx")
        (feed,) = parity.feeds(graph, 2, count=1)
        (found,) = session(tmp_path / f"{graph.name}-2.onnx", torch.device("cuda")).run(None, feed)
        (expected,) = parity.eager(graph, feed).values()
        error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
        assert error <= parity.HALF_TOLERANCES[graph.name].error, f"{graph.name}: {error:.1e}"


@pytest.mark.parametrize("refit", [False, True], ids=["inputs", "refit"])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_engines_edit_as_eager_pytorch_does(exported, target: Target, refit: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Built for this GPU, each compared with eager PyTorch while it is written, then run with CUDA graphs."""
    import shutil

    from tav_opt import editing
    from tav_opt.engines.pytorch import open_checkpoint
    from tav_opt.engines.registry import open_clip
    from tav_opt.export.tensorrt import build

    try:
        plan = build.plan(build.EngineConfig(target=target, refit=refit))
    except InputError as error:
        pytest.skip(str(error))
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    (clip,) = repository.glob("*/1/clips/first")
    build.export(plan, clip, say=print)
    config = EditConfig(prompts=("a cat is skiing",), steps=4, guidance_scale=7.5)
    found = editing.edit(open_clip(repository, "first", engine="tensorrt"), config)
    expected = editing.edit(open_checkpoint(exported.checkpoint), config)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert expected.std() > 10
    assert difference.mean() < 1 and difference.max() <= 16, f"{difference.mean():.3f}, {difference.max()}"
