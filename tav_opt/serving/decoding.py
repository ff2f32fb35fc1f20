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
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO

import numpy as np

from tav_opt import video
from tav_opt.config import InputError
from tav_opt.contract import MAX_VIDEO_BYTES
from tav_opt.video.containers import Limits

REFUSED = 2
"""Exit status for a file that is at fault."""
ADDRESS_SPACE = 4 << 30
"""Bytes that the process may map; FFmpeg's threads and libraries take about one GiB of it."""
MEMORY = 1 << 30
"""Bytes of frames, where they are more than the least that may be; the process needs them twice."""
POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the frames of a video that was sent must be."""

    name: str = "video"
    """Of the input."""
    least: int
    most: int
    height: int
    width: int

    def __str__(self) -> str:
        frames = f"{self.least} frames" if self.least == self.most else f"{self.least} to {self.most} frames"
        return f"{frames} of {self.width}×{self.height}"


def decode(
    data: bytes, wanted: Wanted, *, seconds: float, keep_waiting: Callable[[], None] = lambda: None
) -> np.ndarray:
    """A video file's frames uint8 (f, H, W, 3), which must be as many and as large as they are wanted.

    Raises InputError for any other file, and for one that takes longer than `seconds`; what `keep_waiting`, which is
    called every POLL_SECONDS, raises goes through.
    """
    shape = (-1, wanted.height, wanted.width, 3)
    numbers = (wanted.least, wanted.most, wanted.height, wanted.width)
    command = [_python(), "-m", "tav_opt.serving.decoding", *map(str, numbers)]
    with _in_memory(data) as file, subprocess.Popen(command, stdin=file, stdout=PIPE, stderr=PIPE) as process:
        try:
            found, said = _communicate(process, seconds, keep_waiting, wanted.name)
        finally:
            process.kill()  # does nothing where it has ended
    takes = f"the clip takes {wanted}"
    if process.returncode == REFUSED:
        raise InputError(f"input {wanted.name}: {said.decode(errors='replace').strip()}; {takes}")
    if process.returncode != 0:
        raise InputError(f"input {wanted.name} cannot be decoded; {takes}")
    return np.frombuffer(found, np.uint8).reshape(shape)


def _in_memory(data: bytes) -> IO[bytes]:
    """A file that is on no disk."""
    file = os.fdopen(os.memfd_create("video"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def _communicate(
    process: subprocess.Popen[bytes], seconds: float, keep_waiting: Callable[[], None], name: str
) -> tuple[bytes, bytes]:
    ends = time.monotonic() + seconds
    while True:
        try:
            return process.communicate(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            keep_waiting()
        if time.monotonic() > ends:
            raise InputError(f"input {name} takes longer than {seconds:g} s to decode")


def _python() -> str:
    """The interpreter; inside Triton's Python backend, whose process is none, the one that it takes its packages of."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return shutil.which("python3") or "python3"


def frames_of(data: bytes, wanted: Wanted) -> np.ndarray:
    """All frames uint8 (f, H, W, 3) of a video file; raises InputError unless they are as they are wanted."""
    first = video.decode(data, Limits(bytes=MAX_VIDEO_BYTES), count=1).frames
    if first.shape[1:3] != (wanted.height, wanted.width):
        raise InputError(f"frames of {first.shape[2]}×{first.shape[1]}")
    memory = min(first.nbytes * wanted.most, max(MEMORY, first.nbytes * wanted.least))
    found = video.decode(data, Limits(bytes=MAX_VIDEO_BYTES, frames=wanted.most, memory=memory)).frames
    if len(found) < wanted.least:
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
        least, most, height, width = map(int, arguments)
        wanted = Wanted(least=least, most=most, height=height, width=width)
        found = frames_of(sys.stdin.buffer.read(), wanted)
    except InputError as error:
        print(error, file=sys.stderr)
        return REFUSED
    sys.stdout.buffer.write(found.tobytes())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
