"""`tav-opt api`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from tav_opt.api.api_config import ApiConfig
from tav_opt.config import InputError


def run(arguments: Sequence[str]) -> int:
    """Answer OpenAI's videos API for the clips of a running server."""
    config = tyro.cli(ApiConfig, prog="tav-opt api", args=arguments)
    try:
        from tav_opt.api import listening
    except ModuleNotFoundError as missing:
        raise InputError(f"{missing.name} is not installed: pip install 'tav-opt[api]'") from None
    listening.run(config)
    return 0
