"""`tav-opt demo`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro


def run(arguments: Sequence[str]) -> None:
    """Tune, export, serve and edit one clip, then show the result."""
    from tav_opt.demo.run import DemoConfig
    from tav_opt.demo.run import run as show

    show(tyro.cli(DemoConfig, prog="tav-opt demo", args=arguments))
