"""`tav-opt app`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro


def run(arguments: Sequence[str]) -> None:
    """Open a page in the browser that edits and tunes clips."""
    from tav_opt.app import app_config

    config = tyro.cli(app_config.AppConfig, prog="tav-opt app", args=arguments)
    app_config.check(config)
    from tav_opt.app import page

    page.serve(config)
