"""`tav-opt app`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from tav_opt.app import app_config
from tav_opt.app.app_config import AppConfig


def run(arguments: Sequence[str]) -> None:
    """Open a page in the browser that edits and tunes clips."""
    config = tyro.cli(AppConfig, prog="tav-opt app", args=arguments)
    app_config.check(config)
    from tav_opt.app import page

    page.serve(config)
