"""The fp16 UNet that ONNX Runtime takes on GPUs: no GPU is here, the processor's provider runs the graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import Exported, export_once
from test_onnxruntime_choice import CPU as CPU_PROVIDER
from test_onnxruntime_choice import installed

from tav_opt import editing
from tav_opt.config import EditConfig, InputError
from tav_opt.engines import onnxruntime as engine
from tav_opt.engines import registry
from tav_opt.engines.onnxruntime import CUDA
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.export import half, half_graph, parity, whole_edit
from tav_opt.export.__main__ import main
from tav_opt.files import read_json, write_json
from tav_opt.repository.layout import info_of

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With the fp16 UNet."""
    found = export_once(golden, tmp_path_factory.getbasetemp())
    half_graph.export(found.version / "clips" / "first")
    return found


def test_it_is_compared_with_eager_pytorch_and_kept_beside(exported: Exported) -> None:
    folder = engine.half_folder(exported.base)
    manifest = read_json(folder / "manifest.json")
    assert 1e-5 < manifest["parity"]["error"] <= parity.HALF_TOLERANCES["unet"].error == manifest["parity"]["tolerance"]
    assert 90 > manifest["edit"]["psnr"] >= manifest["edit"]["least"] == whole_edit.HALF
    assert {*manifest["files"]} == {engine.HALF_UNET, f"{engine.HALF_UNET}.data"}
    before = (folder / engine.HALF_UNET).stat().st_mtime_ns
    assert half_graph.export(exported.version / "clips" / "first") == folder
    assert (folder / engine.HALF_UNET).stat().st_mtime_ns == before, "what fits is left"


def test_edits_by_it_are_within_fp16s_error(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine, the clip's values bound in fp16, as on a GPU but for what runs the nodes."""
    monkeypatch.setattr(engine, "precision", lambda _base, _device: "fp16")
    found = registry.open_clip(exported.repository, "first", engine="onnxruntime", device=CPU)
    truth = open_checkpoint(exported.checkpoint)
    text, latents = truth.encode_text(["", "a cat"]), torch.cat([truth.inverted_latents] * 2)
    noise, expected = found.predict(latents, 501, text), truth.predict(latents, 501, text)
    error = (noise - expected).abs().max() / expected.abs().max()
    assert noise.dtype == torch.float32 and 1e-5 < error <= parity.HALF_TOLERANCES["unet"].error
    config = EditConfig(prompts=("a cat is skiing",), steps=3, guidance_scale=7.5)
    frames = editing.edit(found, config).astype(int) - editing.edit(truth, config)
    assert np.abs(frames).mean() <= 3.0
    latent_bytes = found.source_latents.nbytes + found.inverted_latents.nbytes
    values = sum(2 * int(np.prod(value.shape)) for value in truth.sd.unet.parameters() if value is not None)
    assert 0 < found.held_bytes - latent_bytes < values, "of fp16"


def test_processors_keep_fp32_and_gpus_say_what_they_take(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    info = info_of(exported.version / "clips" / "first")
    installed(monkeypatch, [CUDA, CPU_PROVIDER])
    assert engine.graph_files(exported.base, CPU)["unet"][0] == exported.base / "unet.onnx"
    assert engine.graph_files(exported.base, GPU)["unet"][0] == engine.half_folder(exported.base) / engine.HALF_UNET
    assert str(registry.choose(exported.base, info, CPU, "onnxruntime")) == "onnxruntime on cpu"
    assert str(registry.choose(exported.base, info, GPU, "onnxruntime")) == "onnxruntime fp16 on cuda:0"


def test_what_stays_fp32_runs_in_tf32_beside_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only beside it: a base without an fp16 graph is held to fp32's tolerances."""
    opened: list[tuple[str, Any]] = []

    def session(path: Path, options: object, providers: list[Any]) -> SimpleNamespace:
        opened.append((path.name, providers[0][1]["use_tf32"]))
        return SimpleNamespace(get_providers=lambda: [CUDA, CPU_PROVIDER])

    info = info_of(exported.version / "clips" / "first")
    monkeypatch.setattr(installed(monkeypatch, [CUDA, CPU_PROVIDER]), "InferenceSession", session)
    engine.OnnxGraphs(exported.base, info, GPU)
    names = ["text_encoder.onnx", "vae_encoder.onnx", engine.HALF_UNET, "vae_decoder.onnx"]
    assert opened == [(name, 1) for name in names]
    opened.clear()
    monkeypatch.setattr(engine, "half_folder", lambda base: base / "engines" / "absent")
    engine.OnnxGraphs(exported.base, info, GPU)
    assert {tf32 for _, tf32 in opened} == {0} and "unet.onnx" in dict(opened)


def test_one_of_other_graphs_or_altered_is_refused(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes its place in silence."""
    info = info_of(exported.version / "clips" / "first")
    installed(monkeypatch, [CUDA, CPU_PROVIDER])
    folder = engine.half_folder(exported.base)
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"made_of": {}})
    assert "other graphs" in str(engine.why_not(exported.base, info, GPU))
    assert engine.why_not(exported.base, info, CPU) is None, "processors do not use it"
    write_json(folder / "manifest.json", manifest | {"files": manifest["files"] | {engine.HALF_UNET: "0" * 64}})
    with pytest.raises(InputError, match=r"unet\.fp16\.onnx is missing or altered"):
        engine.OnnxGraphs(exported.base, info, GPU)
    write_json(folder / "manifest.json", manifest)


def test_one_that_departs_is_not_written(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, plain = exported.version / "clips" / "first", half.write
    monkeypatch.setattr(engine, "half_folder", lambda base: base / "engines" / "wrong")

    def wrong(source: Path, target: Path, values: Any) -> Path:
        model = onnx.load(plain(source, target, values))
        bias = next(i for i in model.graph.initializer if i.name.endswith("conv_out.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.1), bias.name))
        half.save(model, target)
        return target

    monkeypatch.setattr(half, "write", wrong)
    with pytest.raises(parity.ParityError, match=r"unet: error .* over its tolerance 1e-02"):
        half_graph.export(clip)
    assert not (exported.base / "engines" / "wrong").exists()


def test_the_option_is_for_onnx_alone(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(exported.checkpoint), "--half", "--target", "compiled"]) == 2
    assert "--half is for --target onnx" in capsys.readouterr().err
    assert main([str(exported.checkpoint), "--half", "--repository", str(exported.repository), "--name", "first"]) == 0
    assert str(engine.half_folder(exported.base)) in capsys.readouterr().out
