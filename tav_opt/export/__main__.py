"""`python -m tav_opt.export ckpt/`: the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tqdm import tqdm

from tav_opt import command, progress
from tav_opt.base.options import AddedOptions, moved
from tav_opt.clip_folder import hub_id_of
from tav_opt.conditions.network_options import NetworkOptions, named
from tav_opt.config import (
    Additions,
    ClipConfig,
    Count,
    DdimSteps,
    Fit,
    Index,
    InputError,
    InversionConfig,
    Iterations,
    OnProgress,
    Side,
    check_numbers,
)

if TYPE_CHECKING:
    from tav_opt.export.additions import Further
    from tav_opt.export.parity import OnGraph, Parity
    from tav_opt.export.tensorrt import build
    from tav_opt.export.whole_edit import EditParity, OnEdit


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export tuned clips to the server's model repository."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `tav-opt tune` wrote, or that the reference implementation saved, or hub ids of clips: one or more,
    one after the other."""
    repository: Path = Path("serving/model_repository")
    """Model repository, made where it is not there."""
    name: str | None = None
    """The clip's name there (the checkpoint folder's); for one checkpoint."""
    target: Literal["onnx", "compiled", "tensorrt", "tensorrt-rtx"] = "onnx"
    """onnx: graphs for ONNX Runtime; every target writes them. compiled: programs by PyTorch's AOTInductor, which needs
    a C++ compiler, for this machine's GPU (fp16; never run so far), or its processor where it has none. tensorrt:
    engines for this machine's GPU, with our kernel inside; written against TensorRT's API and never run so far.
    tensorrt-rtx: engines for the cards of --arch, built without a GPU; built, and never run so far."""
    arch: tuple[str, ...] = ()
    """Cards for tensorrt-rtx by architecture, e.g. sm89 sm120; none: this machine's GPU."""
    plugin: bool = True
    """Our attention kernel in tensorrt's engines (tensorrt-rtx takes none); without it, scores of n × 2n are kept."""
    attention_control: bool = False
    """Add the UNet's graph with attention control to the base, for --keep and the settings beside it."""
    feature_reuse: bool = False
    """Add two more graphs of the UNet to the base, over the same weights, for --reuse-interval."""
    networks: tyro.conf.OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    """What clips on this base may follow maps by; where they were added before, again for another target."""
    half: bool = False
    """For onnx: the UNet in fp16 too, and what was added, which ONNX Runtime takes on GPUs; never run on one so far."""
    refit: bool = False
    """The clip's values as constants to refit, not as inputs: to measure one against the other."""
    debug_parity: bool = False
    """Name the first layer whose fp16 values depart from the fp32 graph's: of every fp16 graph, in ONNX Runtime; and,
    where the GPU that engines are for is here, of each engine built once more with every layer given out. The engines'
    half was built, and never run so far."""
    base: str | None = None
    """The base model, where it is no longer where the clip was tuned; so are the next four what was added to it."""
    additions: tyro.conf.OmitArgPrefixes[AddedOptions] = field(default_factory=AddedOptions)
    prompt: str | None = None
    """Caption; only for one directory that the reference saved, as are all below."""
    video: Path | None = None
    """Source clip that it was tuned on."""
    start: Index = ClipConfig.start
    stride: Count = ClipConfig.stride
    frames: Count = ClipConfig.frames
    uniform: bool = ClipConfig.uniform
    height: Side = ClipConfig.height
    width: Side = ClipConfig.width
    fit: Fit = ClipConfig.fit
    inversion_steps: DdimSteps = InversionConfig.steps
    inversion_iterations: Iterations = InversionConfig.iterations

    def moved(self) -> Additions | None:
        """Where the base is now, as far as that is given."""
        return moved(self.base, self.additions)

    def source(self) -> ClipConfig | None:
        """The clip to read, if one is given."""
        if self.video is None:
            return None
        return ClipConfig(**{one.name: getattr(self, one.name) for one in fields(ClipConfig)})


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tav_opt.export") -> int:
    """Returns 0, 1 when a graph departs from eager PyTorch or cannot be compiled, 2 for bad input."""
    return command.run(prog, lambda given: export(given, prog), arguments)


def export(arguments: Sequence[str], prog: str) -> int:
    """As `main`; errors are the caller's to tell."""
    config = tyro.cli(ExportConfig, prog=prog, args=arguments)
    check_numbers(config)
    _check_checkpoints(config)
    from tav_opt.export import parity
    from tav_opt.export.tensorrt import builder

    plan = _plan(config)
    try:
        for checkpoint in config.checkpoints:
            print(*_export_one(checkpoint, config, plan), sep="\n", flush=True)
    except (parity.ParityError, builder.BuildError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _check_checkpoints(config: ExportConfig) -> None:
    """All of them, before the first is exported."""
    if not config.checkpoints:
        raise InputError("give one checkpoint or more")
    for checkpoint in config.checkpoints:
        if not checkpoint.is_dir() and hub_id_of(checkpoint) is None:
            raise InputError(f"checkpoint {checkpoint} does not exist or is no folder")
    if len(config.checkpoints) == 1:
        return
    for option in ("name", "prompt", "video"):
        if getattr(config, option) is not None:
            raise InputError(f"--{option} is for one checkpoint, and {len(config.checkpoints)} are given")
    from tav_opt.export.exporting import name_of

    names = [name_of(checkpoint) for checkpoint in config.checkpoints]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two checkpoints are called {twice}, and their clips would be: export one with --name")


def _export_one(checkpoint: Path, config: ExportConfig, plan: build.Plan | None) -> list[Path]:
    """The clip's folder, and those of what is made beside its graphs."""
    from tav_opt.export import controlled, exporting, reusable

    def report(name: str, found: Parity) -> None:
        print(f"{name}: largest error {found.error:.1e} against eager PyTorch (tolerance {found.tolerance.error:.0e})")

    def report_edit(name: str, found: EditParity) -> None:
        print(f"a whole edit by {name}: {found.psnr:.1f} dB against eager PyTorch ({found.least:g} dB at least)")

    further = [controlled.CONTROLLED] if config.attention_control else []
    further += reusable.REUSABLE if config.feature_reuse else []
    with progress.shown(leave=False) as on_progress:
        folder = exporting.export(
            checkpoint,
            config.repository,
            name=config.name,
            base=config.moved(),
            source=config.source(),
            prompt=config.prompt,
            inversion=InversionConfig(steps=config.inversion_steps, iterations=config.inversion_iterations),
            controlnets=named("controlnet", config.networks.controlnet, "PLACE"),
            adapters=named("adapter", config.networks.adapter, "PLACE"),
            further=further,
            on_graph=report,
            on_edit=report_edit,
            on_progress=on_progress,
        )
    return [folder, *_beside(config, plan, folder, report, report_edit)]


def _beside(
    config: ExportConfig, plan: build.Plan | None, clip: Path, on_graph: OnGraph, on_edit: OnEdit
) -> list[Path]:
    """What is made beside the graphs."""
    if plan is None and config.target == "onnx" and not config.half:
        return []
    from tav_opt.engines.exported import NETWORKS
    from tav_opt.export import beside, compiled, conditions, half_graph
    from tav_opt.repository.layout import base_of

    further = conditions.further(
        named("controlnet", config.networks.controlnet, "PLACE"),
        named("adapter", config.networks.adapter, "PLACE"),
        base_of(clip),
    )
    with progress.shown(leave=False) as on_progress:
        if plan is not None:
            folders = _engines(plan, clip, config.moved(), further, on_progress)
        else:
            make = compiled.export if config.target == "compiled" else half_graph.export
            reports: dict[str, Any] = {"on_graph": on_graph, "on_edit": on_edit, "on_progress": on_progress}
            folders = [make(clip, base=config.moved(), further=further, **reports)]
    for folder in folders:
        left = beside.lacking(folder, base_of(clip), further)
        for name in left.unknown:
            kind, _, own = name.partition("_")
            if kind in NETWORKS:  # what else there is of one comes with it
                _say(f"{folder.name} is without {name}: give --{kind} {own}=PLACE again for it")
        for name in left.makeable:
            _say(f"{folder.name} is without {name}: what was added is not refitted")
    return folders


def _plan(config: ExportConfig) -> build.Plan | None:
    """What engines are asked for, if any, found possible before anything is exported."""
    if config.half and config.target != "onnx":
        raise InputError(f"--half is for --target onnx; {config.target} has a precision of its own")
    if config.target == "onnx" or config.target == "compiled":
        if config.arch or config.refit or config.debug_parity:
            raise InputError("--arch, --refit and --debug-parity are for --target tensorrt and tensorrt-rtx")
        return None
    from tav_opt.export.tensorrt import build

    return build.plan(
        build.EngineConfig(
            target=config.target,
            cards=config.arch,
            plugin=config.plugin,
            refit=config.refit,
            debug_parity=config.debug_parity,
        )
    )


def _engines(
    plan: build.Plan, clip: Path, base: Additions | None, further: list[Further], on_progress: OnProgress | None
) -> list[Path]:
    from tav_opt.export.tensorrt import build

    return build.export(plan, clip, base=base, further=further, say=_say, on_progress=on_progress)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
