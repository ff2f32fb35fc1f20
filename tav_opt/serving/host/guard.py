"""Ends a server whose host has gone, however it went: a process of its own, on the standard library alone.

`python guard.py` reads what to end as a line of JSON, and then waits for the end of its standard input, which the host
holds and never writes to again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # nosec B108  # where the kernel has it; names are drawn at random


def end(group: int | None, shared_memory: str, folder: str) -> None:
    """Kills a process group at once, where there is one, and removes the shared memory under a prefix, and a folder."""
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.2)  # what is killed may still be about to make a region
    for region in SHARED_MEMORY.glob(f"{shared_memory}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def start(group: int, shared_memory: str, folder: Path) -> subprocess.Popen[bytes]:
    """A guard for a server; whoever kills it calls it off."""
    process = subprocess.Popen([sys.executable, "-IS", __file__], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps([group, shared_memory, str(folder)]).encode() + b"\n")
    process.stdin.flush()
    return process


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it goes last
    told = json.loads(sys.stdin.readline())
    sys.stdin.read()
    end(*told)
