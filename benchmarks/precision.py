"""What each fp32 island of the fp16 UNet is worth, in error: `python benchmarks/precision.py --help`.

Every value that is fp16 in the graph is rounded to fp16 here (onnxruntime on a CPU would keep more). Without its island
an operator is taken apart into steps that are rounded one by one, as a compiler may run it in fp16. Nothing is timed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch
import tyro
from common import header, machine
from presets import prepare
from torch import Tensor

from tav_opt import command, ddim
from tav_opt.checkpoint import load_tensors
from tav_opt.contract import ClipInfo
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.onnxruntime import session
from tav_opt.engines.registry import open_clip
from tav_opt.export import exporting, half, layers
from tav_opt.export.rounding import rounded
from tav_opt.export.whole_edit import psnr
from tav_opt.files import read_json, write_json

NORMS, SOFTMAX, SINUSOID = ("InstanceNormalization",), ("Softmax",), ("Sin", "Cos")
VARIANTS: dict[str, tuple[str, ...]] = {
    "all islands": (),
    "without norm statistics": NORMS,
    "without softmax": SOFTMAX,
    "without the timestep's sinusoid": SINUSOID,
    "no islands": (*NORMS, *SOFTMAX, *SINUSOID),
}
"""Which operators run in fp16 that are islands otherwise."""

_ROUND = "h = Cast <to = 10> (x)"
STEPS = {
    "Softmax": f"""(x) => (y) {{
        {_ROUND}
        axes = Constant <value_ints = [-1]> ()
        top = ReduceMax (h, axes)
        below = Sub (h, top)
        e = Exp (below)
        total = ReduceSum (e, axes)
        share = Div (e, total)
        y = Cast <to = 1> (share)
    }}""",
    "InstanceNormalization": f"""<epsilon> (x, scale, bias) => (y) {{
        {_ROUND}
        axes = Constant <value_ints = [2]> ()
        mean = ReduceMean (h, axes)
        centred = Sub (h, mean)
        square = Mul (centred, centred)
        variance = ReduceMean (square, axes)
        small = Constant <value_float: float = @epsilon> ()
        small_half = Cast <to = 10> (small)
        padded = Add (variance, small_half)
        deviation = Sqrt (padded)
        normal = Div (centred, deviation)
        one = Constant <value_ints = [1]> ()
        scale_half = Cast <to = 10> (scale)
        bias_half = Cast <to = 10> (bias)
        scale_wide = Unsqueeze (scale_half, one)
        bias_wide = Unsqueeze (bias_half, one)
        scaled = Mul (normal, scale_wide)
        moved = Add (scaled, bias_wide)
        y = Cast <to = 1> (moved)
    }}""",
    "Sin": f"(x) => (y) {{ {_ROUND} s = Sin (h) y = Cast <to = 1> (s) }}",
    "Cos": f"(x) => (y) {{ {_ROUND} s = Cos (h) y = Cast <to = 1> (s) }}",
}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Errors of the fp16 UNet with and without its islands, layer by layer and in decoded frames."""

    preset: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder."""
    prompt: str = "a tiger on the beach"
    """Of the edit whose frames are compared."""
    frames: int = 8
    size: int | None = None
    """Pixels of a side; default: the model's own."""
    steps: int = 50
    guidance_scale: float = 12.5
    out: Path = Path("benchmarks/results/precision.json")


def narrowed(model: onnx.ModelProto, op_types: Collection[str]) -> onnx.ModelProto:
    """Islands of these operators become steps in fp16."""
    for node in model.graph.node:
        if node.op_type in op_types:
            node.domain = "steps"
            kept = [a for a in node.attribute if a.name == "epsilon"]
            del node.attribute[:]
            node.attribute.extend(kept)
    opset = next(o.version for o in model.opset_import if not o.domain)
    for op_type in op_types:
        text = f'<domain: "steps", opset_import: ["" : {opset}]> {op_type} {STEPS[op_type]}'
        model.functions.append(onnx.parser.parse_function(text))
    model.opset_import.append(onnx.helper.make_opsetid("steps", 1))
    return onnx.inliner.inline_local_functions(model)


def graph_predict(path: Path, values: dict[str, np.ndarray]) -> ddim.Predict:
    """The noise by a graph of b = 2."""
    run = session(path, torch.device("cpu")).run

    def predict(latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        timesteps = np.full(latents.shape[0], timestep, np.int64)
        feed = {"latents": latents.numpy(), "timestep": timesteps, "text": text.numpy(), **values}
        return torch.from_numpy(run(None, feed)[0])

    return predict


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A guided sampling in fp32: its frames, and what was predicted from what on the way."""

    engine: ExportedEngine
    config: Precision
    frames: np.ndarray
    calls: list[tuple[Tensor, int, Tensor, Tensor]]

    @classmethod
    def of(cls, engine: ExportedEngine, config: Precision) -> Reference:
        """Samples by the engine itself."""
        calls = []

        def predict(latents: Tensor, timestep: int, text: Tensor) -> Tensor:
            noise = engine.predict(latents, timestep, text)
            calls.append((latents, timestep, text, noise))
            return noise

        return cls(engine=engine, config=config, frames=sampled(engine, predict, config), calls=calls)

    def noise_error(self, predict: ddim.Predict) -> float:
        """Root mean square over that of the noise, from the same latents at ten of the steps."""
        chosen = self.calls[:: max(1, len(self.calls) // 10)]
        errors = [predict(*inputs) - noise for *inputs, noise in chosen]
        return float(torch.stack(errors).norm() / torch.stack([noise for *_, noise in chosen]).norm())

    def psnr(self, predict: ddim.Predict) -> float:
        """Of the frames of a whole sampling."""
        return psnr(sampled(self.engine, predict, self.config), self.frames)


def sampled(engine: ExportedEngine, predict: ddim.Predict, config: Precision) -> np.ndarray:
    """Frames of a guided sampling."""
    text = engine.encode_text(["", config.prompt])
    latents = ddim.sample(
        predict, engine.inverted_latents, text[1:], engine.schedule, config.steps,
        unconditional=text[:1], guidance_scale=config.guidance_scale,
    )  # fmt: skip
    return engine.decode(latents)


def main(config: Precision) -> int:
    """Exports, then measures every variant; returns 0."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ckpt = prepare(config.preset, work, frames=config.frames, size=config.size, steps=config.steps)
        clip = exporting.export(ckpt, work / "repository", name="clip")
        engine = open_clip(work / "repository", "clip")
        rows = _measure(config, work, engine, clip)
    info = engine.info
    what = {
        "clip": info.prompt, "edit": config.prompt, "frames": info.frames, "size": [info.height, info.width],
        "steps": config.steps, "guidance": config.guidance_scale,
    }  # fmt: skip
    print(header("fp16 UNet, " + ", ".join(f"{key} {value}" for key, value in what.items())))
    print("\n| fp16 graph | worst layer | its error | error of the noise | PSNR of the frames, dB |")
    print("|---|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {row['layer']} | {row['worst']:.1e} | {row['noise']:.1e} | {row['psnr']:.1f} |")
    write_json(config.out, {"what": what, "machine": machine(), "rows": rows})
    return 0


def _measure(config: Precision, work: Path, engine: ExportedEngine, clip: Path) -> dict[str, dict[str, float | str]]:
    base = clip.parents[1] / "base" / ClipInfo.from_json(read_json(clip / "manifest.json")).exported_base
    tensors = load_tensors(clip / "values.safetensors")
    values = {engine.base.value_inputs[name]: value.half().numpy() for name, value in tensors.items()}
    graph = half.write(base / "unet.onnx", work / "unet.half.onnx", set(values))
    fp32 = work / "reference.onnx"
    os.link(base / "unet.onnx.data", work / "unet.onnx.data")  # where the copy looks for its weights
    onnx.save(half.fixed(base / "unet.onnx", 2, "standard"), fp32)
    reference = Reference.of(engine, config)
    latents, timestep, text, _ = reference.calls[0]
    feed = {"latents": latents.numpy(), "timestep": np.full(2, timestep, np.int64), "text": text.numpy(), **values}
    rows: dict[str, dict[str, float | str]] = {}
    for name, op_types in VARIANTS.items():
        path = work / "variant.onnx"
        onnx.save(rounded(narrowed(half.fixed(graph, 2, "standard"), op_types)), path)
        runners = [layers.marked_runner(file, work) for file in (fp32, path)]
        worst = max(layers.by_layer(*runners, feed), key=lambda d: d.error)
        predict = graph_predict(path, values)
        rows[name] = {
            "layer": worst.tensor,
            "worst": worst.error,
            "noise": reference.noise_error(predict),
            "psnr": reference.psnr(predict),
        }
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(
        command.run(
            "benchmarks/precision.py",
            lambda arguments: main(tyro.cli(Precision, prog="benchmarks/precision.py", args=arguments)),
        )
    )
