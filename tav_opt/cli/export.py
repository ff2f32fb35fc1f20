"""`tav-opt export`."""

from __future__ import annotations

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Export a checkpoint to the server's model repository."""
    from tav_opt.export.__main__ import export as export_clip

    return export_clip(arguments, "tav-opt export")
