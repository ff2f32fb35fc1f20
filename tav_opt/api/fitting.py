"""Uploaded videos: frames chosen and fitted to a clip in a process of their own, where a hostile file ends.

Run as a program, it is that process: the file on stdin; on stdout a line of JSON, the frames and the sound as bytes;
on stderr a refusal in one line.
"""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt import video
from tav_opt.config import InputError
from tav_opt.contract import MAX_VIDEO_BYTES, ServedClip
from tav_opt.serving.decoding import REFUSED, restrict
from tav_opt.video.containers import Limits
from tav_opt.video.files import with_sound


async def fitted(path: Path, clip: ServedClip, choice: Mapping[str, Any], *, name: str, seconds: float) -> video.Clip:
    """As many frames of a file as a clip has, as large as they are, chosen as `video.read` does; with their sound.

    Raises InputError, naming the video by the `name` of its field, for files that `video.decode` refuses, and for one
    that takes longer than `seconds`.
    """
    asked = {"count": clip.frames, "height": clip.height, "width": clip.width, **choice}
    command = [sys.executable, "-m", "tav_opt.api.fitting", json.dumps(asked)]
    pipe = asyncio.subprocess.PIPE
    with path.open("rb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdin=file, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(seconds):
            found, said = await process.communicate()
    except TimeoutError:
        raise InputError(f"{name} takes longer than {seconds:g} s to decode") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    takes = f"clip takes {clip.frames} frames of {clip.width}×{clip.height}"
    if process.returncode == REFUSED:
        raise InputError(f"{name}: {said.decode(errors='replace').strip()}; the {takes}")
    if process.returncode != 0:
        raise InputError(f"{name} cannot be decoded; the {takes}")
    return _clip(found)


def _clip(data: bytes) -> video.Clip:
    head, _, rest = data.partition(b"\n")
    told = json.loads(head)
    size = int(np.prod(told["shape"]))
    frames = np.frombuffer(rest[:size], np.uint8).reshape(told["shape"])
    return video.Clip(frames=frames, fps=told["fps"], sound=rest[size:] or None)


def main(arguments: list[str]) -> int:
    restrict()
    data = sys.stdin.buffer.read(MAX_VIDEO_BYTES + 1)
    try:
        clip = video.decode(data, Limits(bytes=MAX_VIDEO_BYTES), **json.loads(arguments[0]))
    except InputError as error:
        print(error, file=sys.stderr)
        return REFUSED
    clip = with_sound(clip, io.BytesIO(data), "clip")
    sys.stdout.buffer.write(json.dumps({"shape": clip.frames.shape, "fps": clip.fps}).encode() + b"\n")
    sys.stdout.buffer.write(clip.frames.tobytes() + (clip.sound or b""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
