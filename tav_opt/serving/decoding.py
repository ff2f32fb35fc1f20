"""Videos of requests, decoded in a process of their own: what a hostile file does to a decoder ends there.

Run as a program, it is that process: the file on stdin, the frames as bytes on stdout, a refusal in one line on stderr.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import IO

import numpy as np

from tav_opt import video
from tav_opt.config import InputError
from tav_opt.contract import MAX_VIDEO_BYTES, ClipInfo
from tav_opt.video.containers import Limits

REFUSED = 2
"""Exit status for a file that is at fault."""
ADDRESS_SPACE = 4 << 30
"""Bytes that the process may map; FFmpeg's threads and libraries take about one GiB of it."""
POLL_SECONDS = 0.02


def decode(
    data: bytes, info: ClipInfo, *, seconds: float, keep_waiting: Callable[[], None] = lambda: None
) -> np.ndarray:
    """A video file's frames uint8 (f, H, W, 3), which must be as many and as large as the clip's.

    Raises InputError for any other file, and for one that takes longer than `seconds`; what `keep_waiting`, which is
    called every POLL_SECONDS, raises goes through.
    """
    shape = (info.frames, info.height, info.width, 3)
    command = [_python(), "-m", "tav_opt.serving.decoding", *map(str, shape[:3])]
    with _in_memory(data) as file, subprocess.Popen(command, stdin=file, stdout=PIPE, stderr=PIPE) as process:
        try:
            found, said = _communicate(process, seconds, keep_waiting)
        finally:
            process.kill()  # does nothing where it has ended
    takes = f"the clip takes {shape[0]} frames of {shape[2]}×{shape[1]}"
    if process.returncode == REFUSED:
        raise InputError(f"input video: {said.decode(errors='replace').strip()}; {takes}")
    if process.returncode != 0:
        raise InputError(f"input video cannot be decoded; {takes}")
    return np.frombuffer(found, np.uint8).reshape(shape)


def _in_memory(data: bytes) -> IO[bytes]:
    """A file that is on no disk."""
    file = os.fdopen(os.memfd_create("video"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def _communicate(
    process: subprocess.Popen[bytes], seconds: float, keep_waiting: Callable[[], None]
) -> tuple[bytes, bytes]:
    ends = time.monotonic() + seconds
    while True:
        try:
            return process.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            keep_waiting()
        if time.monotonic() > ends:
            raise InputError(f"input video takes longer than {seconds:g} s to decode")


def _python() -> str:
    """The interpreter; inside Triton's Python backend, whose process is none, the one that it takes its packages of."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return shutil.which("python3") or "python3"


def frames_of(data: bytes, frames: int, height: int, width: int) -> np.ndarray:
    """All frames uint8 (f, H, W, 3) of a video file; raises InputError unless they are as many and as large as told."""
    first = video.decode(data, Limits(bytes=MAX_VIDEO_BYTES), count=1).frames
    if first.shape[1:3] != (height, width):
        raise InputError(f"frames of {first.shape[2]}×{first.shape[1]}")
    limits = Limits(bytes=MAX_VIDEO_BYTES, frames=frames, memory=first.nbytes * frames)
    found = video.decode(data, limits).frames
    if len(found) != frames:
        raise InputError(f"{len(found)} frames")
    return found


def restrict() -> None:
    """No more memory than decoding takes, and no file written, from here to the process's end."""
    for kind, most in (
        (resource.RLIMIT_AS, ADDRESS_SPACE),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def main(arguments: list[str]) -> int:
    restrict()
    try:
        found = frames_of(sys.stdin.buffer.read(), *map(int, arguments))
    except InputError as error:
        print(error, file=sys.stderr)
        return REFUSED
    sys.stdout.buffer.write(found.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
