"""`tav-opt serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from tav_opt.serving.host.serve_config import ServeConfig


def run(arguments: Sequence[str]) -> int:
    """Start NVIDIA Triton Inference Server on the exported clips."""
    from tav_opt.serving.host import supervisor

    return supervisor.serve(told(arguments))


def told(arguments: Sequence[str]) -> ServeConfig:
    """What a command line says; what follows `--` is tritonserver's."""
    from tav_opt.serving.host import serve_config

    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    config = tyro.cli(serve_config.ServeConfig, prog="tav-opt serve", args=arguments[:end])
    return replace(config, tritonserver_args=tuple(arguments[end + 1 :]))
