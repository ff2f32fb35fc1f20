"""What the page shows beside Gradio's own components: players, previews, progress, errors, thumbnails, tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

STAGES = {"invert": "inverting the source", "sample": "sampling", "tune": "tuning"}
"""What the stages of an edit and of tuning are called."""


class Shown(NamedTuple):
    """A video of a player: its address and what stands on it."""

    url: str
    caption: str


def address(path: Path) -> str:
    """Of a file that the page may show, relative to the page: it may lie behind a proxy's path."""
    return f"gradio_api/file={quote(str(path))}"


def player(videos: Sequence[Shown]) -> str:
    """One video, or two that play together, beside each other or one over the other with a slider to wipe."""
    if not videos:
        return ""
    screens = "".join(
        f'<div class="tav-screen"><video src="{escape(one.url)}" muted loop autoplay playsinline preload="auto" '
        f'aria-label="{escape(one.caption)}"></video><span class="tav-tag">{escape(one.caption)}</span></div>'
        for one in videos
    )
    wipe, toggle = "", ""
    if len(videos) == 2:
        wipe = (
            '<input class="tav-wipe" type="range" min="0" max="100" value="50" '
            'aria-label="Wipe between the two" title="Wipe between the two">'
        )
        toggle = '<button class="tav-toggle" type="button" aria-pressed="false">Wipe</button>'
    return (
        f'<figure class="tav-player" data-count="{len(videos)}"><div class="tav-screens">{screens}{wipe}</div>'
        '<div class="tav-bar"><button class="tav-play" type="button" aria-label="Pause">❚❚</button>'
        '<input class="tav-seek" type="range" min="0" max="1000" value="0" aria-label="Time">'
        f"{toggle}</div></figure>"
    )


def preview(frames: np.ndarray, fps: float, captions: Sequence[str]) -> str:
    """Small moving pictures uint8 (prompts, f, h, w, 3) of an edit that is under way, enlarged by the browser."""
    moving = "".join(
        f'<div class="tav-screen"><img src="{_webp(one, fps)}" alt="preview of {escape(caption)}">'
        f'<span class="tav-tag">{escape(caption)}</span></div>'
        for one, caption in zip(frames, captions, strict=True)
    )
    screens = f'<div class="tav-screens">{moving}</div>'
    return f'<figure class="tav-player tav-preview" data-count="{len(frames)}">{screens}</figure>'


def thumbnails(frames: np.ndarray, numbers: Iterable[int]) -> str:
    """Frames uint8 (f, H, W, 3) in a row, each with its number in the source."""
    pictures = "".join(
        f'<figure><img src="{_webp(frame[None], 1)}" alt="frame {number}"><figcaption>{number}</figcaption></figure>'
        for frame, number in zip(frames, numbers, strict=True)
    )
    return f'<div class="tav-strip" tabindex="0" role="group" aria-label="The frames that are taken">{pictures}</div>'


def pictures(paths: Iterable[Path]) -> str:
    """Files, below each other, each named as it is."""
    found = "".join(f'<img src="{escape(address(path))}" alt="preview {escape(path.stem)}">' for path in paths)
    return found and f'<div class="tav-pictures">{found}</div>'


def _webp(frames: np.ndarray, fps: float) -> str:
    """As a data URL, which needs no file."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def progress(text: str, done: float | None = None, left: float | None = None) -> str:
    """A line, a bar of the part that is done (None: nobody knows), and the time left in seconds."""
    when = "" if left is None else f"about {duration(left)} left"
    bar = "" if done is None else f' value="{done:.4f}"'
    return (
        f'<div class="tav-progress" role="status"><div><span>{escape(text)}</span><span>{when}</span></div>'
        f'<progress max="1"{bar} aria-label="{escape(text)}"></progress></div>'
    )


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def note(text: str) -> str:
    """A line that something is done."""
    return f'<div class="tav-note" role="status">{escape(text)}</div>' if text else ""


def error(text: str) -> str:
    """What went wrong, in the words of whoever says so."""
    return f'<div class="tav-error" role="alert">{escape(text)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text; on narrow screens it is moved sideways."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return (
        f'<div class="tav-table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def health(state: str, reason: str) -> str:
    """How the server is; the colour is not all that tells."""
    return f'<div class="tav-health tav-{escape(state)}" role="status"><b>{escape(state)}</b> {escape(reason)}</div>'
