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
    target: Literal["onnx"] = "onnx"
    """What the graphs are made for."""
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
    """Returns 0, 1 when a graph departs from eager PyTorch, 2 for bad input."""
    config = tyro.cli(ExportConfig, prog=prog, args=arguments)
    return command.run(prog, lambda: _export(config, prog))


def _export(config: ExportConfig, prog: str) -> int:
    if not config.checkpoint.is_dir():
        raise InputError(f"checkpoint {config.checkpoint} does not exist or is no folder")
    from tav_opt.export import parity, repository

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
    except parity.ParityError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
