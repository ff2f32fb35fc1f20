"""Export: the graphs are eager PyTorch's, one base serves many clips, and nothing half-written has a name."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import FRAMES, Exported, export_once, other_values
from onnx import TensorProto, helper
from onnxscript import optimizer

from tav_opt import checkpoint, models
from tav_opt.config import ClipConfig, InputError, InversionConfig
from tav_opt.engines.registry import open_clip
from tav_opt.export import exporting, graphs, parity, reference_checkpoint, simplifying, sparse_causal
from tav_opt.export.__main__ import main
from tav_opt.export.graphs import Graph
from tav_opt.files import sha256
from tav_opt.kernels import naive as naive
from tav_opt.repository import specs
from tav_opt.repository.specs import GraphSpec, TensorSpec
from tav_opt.video import write


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


def attention_model(frames: int, heads: int, width: int, body: sparse_causal.Body) -> onnx.ModelProto:
    """One SparseCausalAttention node with a body, at any batch and n."""
    shape = ["bf", "n", width]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)
    node = helper.make_node(sparse_causal.NAME, [*"qkv"], ["out"], domain="tav_opt", frames=frames, heads=heads)
    opsets = [helper.make_opsetid(*pair) for pair in (("", sparse_causal.OPSET), ("tav_opt", 1), ("com.microsoft", 1))]
    return helper.make_model(
        helper.make_graph([node], "attention", inputs, [output]),
        opset_imports=opsets,
        functions=[sparse_causal.function_body(body)],
        ir_version=10,
    )


@pytest.mark.parametrize("body", ["onnxruntime", "standard"])
@pytest.mark.parametrize(("b", "frames", "n", "heads", "d"), [(1, 1, 5, 1, 8), (2, 3, 7, 3, 5), (3, 2, 64, 2, 16)])
def test_body_is_sparse_causal_attention(
    body: sparse_causal.Body, b: int, frames: int, n: int, heads: int, d: int
) -> None:
    model = attention_model(frames, heads, heads * d, body)
    onnx.checker.check_model(model)
    q, k, v = torch.randn(3, b * frames, n, heads * d, generator=torch.Generator().manual_seed(0))
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {name: value.numpy() for name, value in zip("qkv", (q, k, v), strict=True)}
    )
    expected = naive.sparse_causal_attention(q, k, v, frames, heads)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_attention_memory_is_linear_in_n(tmp_path: Path) -> None:
    """At n = 4096, two frames and four heads, the scores alone would be 1 GB."""
    onnx.save(attention_model(2, 4, 64, "onnxruntime"), tmp_path / "attention.onnx")
    script = """
import resource, sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = lambda n: session.run(None, {name: numpy.ones((2, n, 64), numpy.float32) for name in "qkv"})
run(64)
before = peak()
run(4096)
print(peak() - before)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "attention.onnx")]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout) / 1024
    assert grown < 128, f"attention at n = 4096 took {grown:.0f} MB"


class Block(torch.nn.Module):
    """What graphs of ours are made of: padded convolutions, a norm of groups, gated halves, layouts, sizes read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, stride=2)
        self.norm, self.linear = torch.nn.GroupNorm(2, 8), torch.nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(self.norm(self.conv(x))) * 1.0 + 0.0
        y = self.down(torch.nn.functional.pad(y, (0, 1, 0, 1)))
        value, gate = self.linear(y.flatten(2).transpose(1, 2)).chunk(2, -1)
        rows = (value * torch.nn.functional.gelu(gate)).unflatten(2, (2, 8)).mean(2)
        return torch.cat([rows.transpose(1, 2).reshape(x.shape[0], 8, 3, 3), y], 1)[:, 1:]


def test_a_graph_is_made_as_simple_as_the_exporter_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """onnxscript's optimizer, which has all its rules and takes several times as long on a UNet, is the truth."""
    x = TensorSpec(name="pixels", shape=("n", 3, 6, 6), dtype="float32")
    spec = GraphSpec(
        name="vae_encoder", inputs=(x,), outputs=(TensorSpec(name="latents", shape=("n", 15, 3, 3), dtype="float32"),)
    )
    graph = Graph(spec=spec, module=Block())
    found = []
    for name, simplify in (
        ("ours", simplifying.simplify),
        ("theirs", optimizer.optimize_ir),
        ("raw", lambda model: None),
    ):
        monkeypatch.setattr(graphs, "simplify", simplify)
        (tmp_path / name).mkdir()
        path = graphs.write(graph, tmp_path / name)
        assert parity.check(graph, parity.in_onnxruntime(path, spec)).error < 1e-6
        found.append(Counter(node.op_type for node in onnx.load(path).graph.node))
    ours, theirs, raw = found
    assert ours == theirs and ours.total() < raw.total()
    assert gc.isenabled()  # which it is not while a graph is traced


def test_every_attention_is_one_node(exported: Exported) -> None:
    model = onnx.load(exported.base / "unet.onnx", load_external_data=False)
    onnx.checker.check_model(exported.base / "unet.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "SparseCausalAttention"]
    names = specs.value_inputs(exported.base)
    assert len(nodes) == sum(name.endswith("attn1.to_q.weight") for name in names) > 0
    for node in nodes:
        assert node.domain == "tav_opt"
        assert {a.name: a.i for a in node.attribute} == {"frames": FRAMES, "heads": 4}
    assert [(f.domain, f.name) for f in model.functions] == [
        ("tav_opt", "SparseCausalAttention"),
        ("tav_opt", "ClipGroupNorm"),
    ]
    assert [i.name for i in model.graph.input] == ["latents", "timestep", "text", *names.values()]


def test_graphs_carry_no_paths_of_the_machine(exported: Exported) -> None:
    for path in exported.base.glob("*.onnx"):
        assert str(Path(torch.__file__).parent).encode() not in path.read_bytes(), path.name


def test_manifest_keeps_parity_and_hashes(exported: Exported) -> None:
    manifest = json.loads((exported.base / "manifest.json").read_text())
    assert {name: found["error"] for name, found in manifest["parity"].items()} == exported.parity
    assert set(exported.parity) == {"text_encoder", "vae_encoder", "unet", "vae_decoder"}
    for name, found in manifest["parity"].items():
        assert 0 <= found["error"] <= found["tolerance"], name
    on_disk = {path.name: sha256(path) for path in exported.base.iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == on_disk


def test_second_clip_only_copies_values(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", refuse)
    before = {path: path.stat().st_mtime_ns for path in exported.base.iterdir()}
    second = other_values(checkpoint.load(exported.checkpoint))
    checkpoint.save(second, tmp_path / "Second Clip!", settings={})
    folder = exporting.export(tmp_path / "Second Clip!", exported.repository)
    assert folder == exported.version / "clips" / "second-clip"
    assert {path: path.stat().st_mtime_ns for path in exported.base.iterdir()} == before
    kept = checkpoint.load_tensors(folder / "values.safetensors")
    assert all(torch.equal(kept[name], value.half()) for name, value in second.values.items())


def test_exports_at_once_leave_a_whole_clip(exported: Exported) -> None:
    failures: list[BaseException] = []

    def export() -> None:
        try:
            for _ in range(5):
                exporting.export(exported.checkpoint, exported.repository, name="contested")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=export) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert open_clip(exported.repository, "contested").info.frames == FRAMES
    assert not list((exported.version / "clips").glob(".*"))


def test_departing_graph_is_not_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = models.load

    def departing(*args: object, **kwargs: object) -> models.StableDiffusion:
        """A text encoder whose numbers change after it was traced."""
        sd = load(*args, **kwargs)
        calls = iter(range(1000))
        sd.text_encoder.register_forward_hook(lambda _m, _i, out: (out[0] + 1e-3 * next(calls),))
        return sd

    monkeypatch.setattr(models, "load", departing)
    assert main([str(exported.checkpoint), "--repository", str(tmp_path)]) == 1
    assert "text_encoder: error" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_nan_is_no_parity() -> None:
    x = TensorSpec(name="x", shape=("n", 2), dtype="float32")
    spec = GraphSpec(name="vae_decoder", inputs=(x,), outputs=(replace(x, name="y"),))
    with pytest.raises(parity.ParityError, match="nan"):
        parity.check(Graph(spec=spec, module=torch.nn.Identity()), lambda given, _: {"y": given["x"] * torch.nan})


def test_what_the_reference_saved_is_read(golden: Path, tmp_path: Path) -> None:
    folder = golden / "reference_checkpoint"
    from safetensors.torch import load_file

    truth = load_file(folder / "end_to_end.safetensors")
    unit = truth["source_video_unit_range"][0].permute(0, 2, 3, 1).numpy()
    write(tmp_path / "clip", (unit * 255).round().astype(np.uint8), 8.0)
    source = ClipConfig(video=tmp_path / "clip", frames=5, stride=1, height=64, width=64)
    tuned = reference_checkpoint.read(folder / "tuned", source, "a panda is skiing", InversionConfig(steps=8))
    saved = torch.load(folder / "tuned" / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert any("attn_temp" in name for name in tuned.values)
    assert all(torch.equal(value, saved[name]) for name, value in tuned.values.items())
    # Frames of 8 bits against floats: half a grey level, through the VAE.
    torch.testing.assert_close(tuned.source_latents, truth["source_latents_mean_scaled"], atol=5e-3, rtol=0)
    torch.testing.assert_close(tuned.inverted_latents, truth["inverted_latents"], atol=5e-2, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda e, g: ["no/such/folder"], "no/such/folder does not exist"),
        (lambda e, g: [str(g / "reference_checkpoint" / "sd")], "is not a checkpoint"),
        (lambda e, g: [str(g / "reference_checkpoint" / "tuned")], "give --video and --prompt"),
        (lambda e, g: [str(e.checkpoint), "--name", "Not A Name"], "'Not A Name'"),
        (lambda e, g: [str(e.checkpoint), "--base", "no/such/base/model"], "no/such/base/model"),
        (lambda e, g: [str(e.checkpoint), "--base", str(g / "reference_checkpoint" / "tuned")], "tuned on"),
        (lambda e, g: [str(e.checkpoint), "--prompt", "x"], "has its own"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: Callable[[Exported, Path], list[str]],
    message: str,
    exported: Exported,
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments(exported, golden), "--repository", str(tmp_path / "repository")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_other_trained_parameters_need_another_repository(exported: Exported, tmp_path: Path) -> None:
    tuned = checkpoint.load(exported.checkpoint)
    tuned.values.pop(next(iter(tuned.values)))
    checkpoint.save(tuned, tmp_path / "fewer", settings={})
    with pytest.raises(InputError, match="choose another --repository"):
        exporting.export(tmp_path / "fewer", exported.repository)
