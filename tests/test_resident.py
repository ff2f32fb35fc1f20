"""What clips take in memory beside their base: their values and latents, each once."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import onnx
import psutil
import torch

from tav_opt import checkpoint
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Schedule
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.engines.onnxruntime import OnnxGraphs
from tav_opt.export.exporting import hashes
from tav_opt.files import write_json
from tav_opt.repository import specs

VALUES = {f"down.{n}.weight": f"w{n}" for n in range(4)}
GRAPH = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[b, 4, 1, 1, 1] latents, int64[b] timestep, float[b, 7] text,
       float[512, 512] w0, float[512, 512] w1, float[512, 512] w2, float[512, 512] w3) => (float[b, 4, 1, 1, 1] noise) {
        wide = Concat <axis = 1> (w0, w1, w2, w3, w0, w1, w2, w3)
        square = Mul (wide, wide)
        cube = Mul (square, wide)
        sum = Add (square, cube)
        all = Add (sum, wide)
        one = ReduceMean <keepdims = 0> (all)
        noise = Mul (latents, one)
    }
"""
"""4 MB of values, several times as much while it runs."""


def open_base(folder: Path) -> ExportedBase:
    folder = folder / info().exported_base
    folder.mkdir()
    onnx.save(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(GRAPH)), folder / "unet.onnx")
    told = {"version": 1, "base_hash": info().base_hash, "latents": [4, 1, 1, 1], "tokens": 7, "scaling_factor": 1.0}
    graphs = [asdict(specs.of_onnx(folder / "unet.onnx", VALUES))]
    write_json(folder / "manifest.json", {**told, "scheduler": {}, "graphs": graphs, "files": hashes(folder)})
    return ExportedBase(
        folder=folder,
        revision="1",
        latents=(1, 4, 1, 1, 1),
        tokenizer=None,  # type: ignore[arg-type]
        tokens=7,
        value_inputs=VALUES,
        schedule=Schedule.from_config({"beta_start": 0.1, "beta_end": 0.2, "num_train_timesteps": 10}),
        engine="onnxruntime",
        graphs=OnnxGraphs(folder, info(), torch.device("cpu"), 1),
    )


def info() -> ClipInfo:
    return ClipInfo(
        base="sd", base_hash="0" * 64, prompt="a panda", frames=1, height=8, width=8, fps=8.0, inversion_steps=2
    )


def write_clip(folder: Path) -> Path:
    folder.mkdir()
    checkpoint.save_tensors({name: torch.rand(512, 512).half() for name in VALUES}, folder / checkpoint.VALUES)
    latents = torch.rand(1, 4, 1, 1, 1)
    checkpoint.save_tensors({"source": latents, "inverted": latents + 1}, folder / checkpoint.LATENTS)
    write_json(folder / "manifest.json", {**info().to_json(), "files": hashes(folder)})
    return folder


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, and lies between what was not, is held by nobody
    return psutil.Process().memory_full_info().uss


def measured(folder: Path) -> tuple[int, list[int]]:
    """The bytes of a clip, and what is resident with 1, 2, … of them, each of which has predicted."""
    folders = [write_clip(folder / f"clip-{number}") for number in range(9)]
    base, clips, memory = open_base(folder), [], []
    for path in folders:
        clips.append(ExportedEngine.open(path, base))
        clips[-1].predict(clips[-1].inverted_latents, 5, torch.zeros(1, 7))
        memory.append(resident())
    return clips[0].held_bytes, memory


def test_eight_clips_more_are_eight_times_their_values(tmp_path: Path) -> None:
    """A second copy of the values, even in fp16, is half as much again; the base's own memory stays as it was.

    In a process of its own: in this one they may lie in what other tests have left.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        values, memory = pool.submit(measured, tmp_path).result()
    assert values == 4 * 512 * 512 * 4 + 2 * 4 * 4
    assert 0.8 * 8 * values < memory[-1] - memory[0] < 1.15 * 8 * values, [round(m / 1e6, 1) for m in memory]
