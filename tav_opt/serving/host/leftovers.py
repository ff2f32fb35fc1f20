"""What a host and its guard left, both killed: found by the note in a server's folder, and swept at a start."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tav_opt.serving.host import guard

PREFIX = "tav-opt-serve-"
"""Of servers' folders, in the system's folder for temporary files."""
NOTE = "host.json"
SHARED_MEMORY = re.compile("tav-opt-[0-9a-f]{16}-")
"""What the names of a server's regions begin with."""


def note(folder: Path, group: int, shared_memory: str) -> None:
    """Writes down whose a server is, and what it holds."""
    me = psutil.Process()
    told = {"host": me.pid, "since": me.create_time(), "group": group, "shared_memory": shared_memory}
    (folder / NOTE).write_text(json.dumps(told))


def sweep() -> list[str]:
    """Ends and removes what hosts left that live no more; what it was, a line each."""
    swept = []
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{NOTE}"):
        try:
            if path.stat().st_uid == os.getuid() and (line := _swept(json.loads(path.read_text()), path.parent)):
                swept.append(line)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not one of ours, or another start sweeps it now
    return swept


def _swept(told: dict[str, Any], folder: Path) -> str | None:
    if _lives(told["host"], told["since"]) or not SHARED_MEMORY.fullmatch(told["shared_memory"]):
        return None
    group = told["group"] if _is_server_of(told["group"], folder) else None
    regions = list(guard.SHARED_MEMORY.glob(f"{told['shared_memory']}*"))
    guard.end(group, told["shared_memory"], str(folder))
    server = "" if group is None else f"tritonserver {group}, "
    return f"process {told['host']} left {server}{len(regions)} regions of shared memory and {folder}: swept"


def _lives(pid: int, since: float) -> bool:
    try:
        process = psutil.Process(pid)  # the number may be another's by now, or nobody have collected the dead one
        return abs(process.create_time() - since) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_server_of(pid: int, folder: Path) -> bool:
    """Whether a process is the server that was started in a folder: numbers of processes are used again."""
    try:
        return any(str(folder) in word for word in psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
