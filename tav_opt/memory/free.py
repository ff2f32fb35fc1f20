"""Memory that nothing uses: of a GPU, of the machine, or what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1 of Linux's control groups, as a container sees its own."""


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *(_within(*group) for group in _CGROUPS)])


def _within(folder: Path, limit: str, used: str, reclaimable: str) -> int:
    """What a control group's limit leaves, its file cache not counted; a huge number where there is no limit."""
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return 1 << 62
    return max(0, most - now + int(stat.get(reclaimable, 0)))
