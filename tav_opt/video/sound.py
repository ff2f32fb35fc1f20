"""The sound of a video beside its frames: cut out as it is, kept as Matroska, put into an MP4; packets are copied."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tav_opt.video.containers import CONTAINERS

_LOG = logging.getLogger(__name__)

IN_MP4 = {"aac", "mp3", "ac3", "eac3", "opus", "alac"}
"""Codecs that players of MP4 know; another one is encoded anew, as AAC."""
MAX_BYTES = 64 << 20
"""Of the sound of a clip: minutes even where it is not compressed."""


def cut(file: IO[bytes], name: str, begin: float, end: float) -> bytes | None:
    """The best sound track of a video file between two of its times (seconds), from 0 on; None where there is none.

    Packets are copied, those that lie wholly within. Sound that cannot be read or kept is left out, which is logged:
    the pictures are worth having without.
    """
    import av

    file.seek(0)
    found, size = io.BytesIO(), 0
    try:
        with av.open(file, options={"format_whitelist": CONTAINERS}, metadata_errors="replace") as source:
            stream = source.streams.best("audio")
            if stream is None or stream.codec_context is None:
                return None
            with av.open(found, "w", format="matroska") as target:
                copy = target.add_stream_from_template(stream)
                for packet in _between(source, stream, begin, end):
                    packet.stream = copy
                    size += packet.size
                    target.mux(packet)
                    if size > MAX_BYTES:
                        raise ValueError(f"over {MAX_BYTES >> 20} MiB of it")
    except (av.error.FFmpegError, ValueError) as error:  # the latter also of codecs that Matroska does not hold
        _LOG.warning("%s: its sound is left out: %s", name, getattr(error, "strerror", None) or error)
        return None
    return found.getvalue() if size else None


def _between(source: Any, stream: Any, begin: float, end: float) -> Iterator[Any]:
    """The packets of a stream that lie within two times, counted from the first of them on."""
    tick = stream.time_base
    for packet in source.demux(stream):
        if packet.pts is None:
            continue
        if packet.pts * tick >= end:
            return
        if packet.pts * tick >= begin and (packet.pts + (packet.duration or 0)) * tick <= end:
            shift = round(begin / tick)
            packet.pts -= shift
            packet.dts = packet.pts
            yield packet


class Track:
    """Sound on its way into an MP4: its stream is there before the first frame is written."""

    def __init__(self, container: Any, matroska: bytes) -> None:
        import av

        self._container = container
        self._source = av.open(io.BytesIO(matroska), format="matroska")
        self._stream = self._source.streams.audio[0]
        if self._stream.codec_context.name in IN_MP4:
            self._target, self._encodes = container.add_stream_from_template(self._stream), False
        else:
            self._target, self._encodes = container.add_stream("aac", rate=self._stream.codec_context.sample_rate), True

    def write(self) -> None:
        """All of it."""
        with self._source:
            if self._encodes:
                for frame in self._source.decode(self._stream):
                    self._container.mux(self._target.encode(frame))
                self._container.mux(self._target.encode(None))
                return
            for packet in self._source.demux(self._stream):
                if packet.pts is not None:
                    packet.stream = self._target
                    self._container.mux(packet)


def added(mp4: bytes, matroska: bytes) -> bytes:
    """An MP4 with a sound beside its video, which is copied, and its metadata."""
    import av

    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a file
        path = Path(folder) / "clip.mp4"
        with (
            av.open(io.BytesIO(mp4), format="mp4") as source,
            av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as target,
        ):
            target.metadata.update(source.metadata)
            video = source.streams.video[0]
            copy = target.add_stream_from_template(video)
            track = Track(target, matroska)
            for packet in source.demux(video):
                if packet.dts is not None:
                    packet.stream = copy
                    target.mux(packet)
            track.write()
        return path.read_bytes()
