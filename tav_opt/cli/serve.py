"""`tav-opt serve`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro


def run(arguments: Sequence[str]) -> int:
    """Start NVIDIA Triton Inference Server on the exported clips."""
    from tav_opt.serving.host import serve_config, supervisor

    return supervisor.serve(tyro.cli(serve_config.ServeConfig, prog="tav-opt serve", args=arguments))
