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
MP3_MIN_RATE = 16_000
"""MP4 holds none below."""
AAC_RATE = 48_000
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


def added(mp4: bytes, matroska: bytes) -> bytes:
    """An MP4 with a sound beside its video, which is copied, and its metadata.

    Without one, which is logged, where the sound cannot be read or written: the pictures are worth having.
    """
    import av

    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a file
        path = Path(folder) / "clip.mp4"
        try:
            with (
                av.open(io.BytesIO(mp4), format="mp4") as pictures,
                av.open(io.BytesIO(matroska), format="matroska") as heard,
                av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as target,
            ):
                target.metadata.update(pictures.metadata)
                _join(target, pictures, heard)
        except Exception as error:  # strangers' sound, many codecs: each fails in its own way
            _LOG.warning("the sound is left out: %s", getattr(error, "strerror", None) or error)
            return mp4
        return path.read_bytes()


def _join(target: Any, pictures: Any, heard: Any) -> None:
    """All packets of both, whose streams are there before the first is written."""
    video, audio = pictures.streams.video[0], heard.streams.audio[0]
    copy = target.add_stream_from_template(video)
    packets = (_copied if _is_known(audio.codec_context) else _encoded)(target, heard, audio)
    for packet in pictures.demux(video):
        if packet.dts is not None:
            packet.stream = copy
            target.mux(packet)
    for packet in packets:
        target.mux(packet)


def _is_known(codec: Any) -> bool:
    """Whether it goes into an MP4 as it is; decoders have names of their own, as `mp3float`."""
    name = codec.codec.canonical_name
    return name in IN_MP4 and (name != "mp3" or codec.sample_rate >= MP3_MIN_RATE)


def _copied(target: Any, heard: Any, audio: Any) -> Iterator[Any]:
    copy = target.add_stream_from_template(audio)

    def packets() -> Iterator[Any]:
        for packet in heard.demux(audio):
            if packet.pts is not None:
                packet.stream = copy
                yield packet

    return packets()


def _encoded(target: Any, heard: Any, audio: Any) -> Iterator[Any]:
    """As AAC, at 48 kHz where AAC does not have the rate."""
    import av

    rate = audio.codec_context.sample_rate
    rate = rate if rate in (av.Codec("aac", "w").audio_rates or ()) else AAC_RATE
    encoder = target.add_stream("aac", rate=rate)

    def packets() -> Iterator[Any]:
        for frame in heard.decode(audio):
            yield from encoder.encode(frame)
        yield from encoder.encode(None)

    return packets()
