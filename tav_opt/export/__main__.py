"""`python -m tav_opt.export ckpt/`: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from tav_opt import command
from tav_opt.config import ClipConfig, InputError, TrainConfig

if TYPE_CHECKING:
    from tav_opt.export import tensorrt
    from tav_opt.export.parity import Parity


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a tuned clip to the server's model repository."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder that `tav-opt tune` wrote, or that the reference implementation saved."""
    repository: Path = Path("serving/model_repository")
    """Model repository, made where it is not there."""
    name: str | None = None
    """The clip's name there (the checkpoint folder's)."""
    target: Literal["onnx", "tensorrt", "tensorrt-rtx"] = "onnx"
    """onnx: graphs for ONNX Runtime. tensorrt: engines for this machine's GPU, with our kernel inside; written against
    TensorRT's API and never run so far. tensorrt-rtx: engines for the cards of --arch, built without a GPU; built, and
    never run so far."""
    arch: tuple[str, ...] = ()
    """Cards for tensorrt-rtx by architecture, e.g. sm89 sm120; none: this machine's GPU."""
    plugin: bool = True
    """Our attention kernel in tensorrt's engines (tensorrt-rtx takes none); without it, scores of n × 2n are kept."""
    refit: bool = False
    """The clip's values as constants to refit, not as inputs: to measure one against the other."""
    debug_parity: bool = False
    """Name the first layer whose fp16 values depart from the fp32 graph's: of every fp16 graph, in ONNX Runtime; and,
    where the GPU that engines are for is here, of each engine built once more with every layer given out. The engines'
    half was built, and never run so far."""
    base: str | None = None
    """The base model, where it is no longer where the clip was tuned."""
    prompt: str | None = None
    """Caption; only for a directory that the reference saved, as are all below."""
    video: Path | None = None
    """Source clip that it was tuned on."""
    start: int = ClipConfig.start
    stride: int = ClipConfig.stride
    frames: int = ClipConfig.frames
    uniform: bool = ClipConfig.uniform
    height: int = ClipConfig.height
    width: int = ClipConfig.width
    fit: Literal["crop", "squash"] = ClipConfig.fit
    inversion_steps: int = TrainConfig.inversion_steps

    def source(self) -> ClipConfig | None:
        """The clip to read, if one is given."""
        if self.video is None:
            return None
        return ClipConfig(
            video=self.video,
            start=self.start,
            stride=self.stride,
            frames=self.frames,
            uniform=self.uniform,
            height=self.height,
            width=self.width,
            fit=self.fit,
        )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tav_opt.export") -> int:
    """Returns 0, 1 when a graph departs from eager PyTorch or cannot be compiled, 2 for bad input."""
    config = tyro.cli(ExportConfig, prog=prog, args=arguments)
    return command.run(prog, lambda: _export(config, prog))


def _export(config: ExportConfig, prog: str) -> int:
    if not config.checkpoint.is_dir():
        raise InputError(f"checkpoint {config.checkpoint} does not exist or is no folder")
    from tav_opt.export import builder, parity, repository

    plan = _plan(config)

    def report(name: str, found: Parity) -> None:
        print(f"{name}: largest error {found.error:.1e} against eager PyTorch (tolerance {found.tolerance.error:.0e})")

    try:
        folder = repository.export(
            config.checkpoint,
            config.repository,
            name=config.name,
            base=config.base,
            source=config.source(),
            prompt=config.prompt,
            inversion_steps=config.inversion_steps,
            on_graph=report,
        )
        folders = [folder] if plan is None else _engines(plan, folder, config.base)
    except (parity.ParityError, builder.BuildError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(*folders, sep="\n")
    return 0


def _plan(config: ExportConfig) -> tensorrt.Plan | None:
    """What engines are asked for, if any, found possible before anything is exported."""
    if config.target == "onnx":
        if config.arch or config.refit or config.debug_parity:
            raise InputError("--arch, --refit and --debug-parity are for --target tensorrt and tensorrt-rtx")
        return None
    from tav_opt.export import tensorrt

    return tensorrt.plan(
        tensorrt.EngineConfig(
            target=config.target,
            cards=config.arch,
            plugin=config.plugin,
            refit=config.refit,
            debug_parity=config.debug_parity,
        )
    )


def _engines(plan: tensorrt.Plan, clip: Path, base: str | None) -> list[Path]:
    from tqdm import tqdm

    from tav_opt.export import tensorrt

    with tqdm(unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def on_progress(what: str, step: int, steps: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total, bar.n = steps, step
            bar.refresh()

        return tensorrt.export(plan, clip, base=base, say=bar.write, on_progress=on_progress)


if __name__ == "__main__":
    sys.exit(main())
