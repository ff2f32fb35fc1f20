"""What a suite is made of: videos, edits, methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tav_opt.config import BaseConfig, ClipConfig, EditConfig, MetricsConfig, TrainConfig, documented

Category = Literal["subject", "background", "style", "mixed", "other"]
"""What an edit changes (paper section 4.2); `other` is what benchmarks have beside."""
Kind = Literal["tune-a-video", "per-frame", "plug-and-play", "folder"]
Attention = Literal["sparse-causal", "each-frame"]


@documented
@dataclass(frozen=True, kw_only=True)
class SuiteEdit:
    """One edit of a video."""

    name: str
    """Within the video; names its files."""
    prompt: str
    """What the edit shall show."""
    category: Category = "mixed"
    """What it changes."""


@documented
@dataclass(frozen=True, kw_only=True)
class SuiteVideo:
    """One video and its edits."""

    name: str
    """Within the suite; names its files."""
    clip: ClipConfig
    """Where it is, and which frames of it are taken."""
    caption: str | None = None
    """What it shows; None: to be made by the suite's captioner."""
    edits: tuple[SuiteEdit, ...] = ()
    """One or more."""
    mask: Path | None = None
    """Where the picture may change, for the background's metrics."""
    source: str = ""
    """Which part of a benchmark it is of, such as TGVE's DAVIS."""


@documented
@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the tables: how every edit is made."""

    name: str
    """As tables and folders call it."""
    kind: Kind = "tune-a-video"
    """Ours; one of the two image baselines that are computed here; or finished videos in a folder."""
    tune: TrainConfig = field(default_factory=TrainConfig)
    """How clips are tuned; for tune-a-video."""
    edit: EditConfig = field(default_factory=EditConfig)
    """How edits are sampled; not for folders."""
    attention: Attention = "sparse-causal"
    """each-frame: without equation 4, for the ablation."""
    folder: Path | None = None
    """Of finished videos, `VIDEO/EDIT.mp4` or a folder of frames `VIDEO/EDIT/`."""


@documented
@dataclass(frozen=True, kw_only=True)
class Suite:
    """One evaluation."""

    file: Path
    """The YAML file that says it."""
    model: str | BaseConfig
    """Stable Diffusion directory or hub id, or one with what is added to it."""
    videos: tuple[SuiteVideo, ...]
    """What is edited."""
    methods: tuple[Method, ...]
    """How; tables have them in this order."""
    metrics: MetricsConfig
    """What measures the edits."""
    captioner: str | None = None
    """Image-captioning model of transformers, for videos without a caption."""
    measured_by: Mapping[str, str] | None = None
    """What the driver found that edits are measured by; a worker that finds another refuses. None: nobody looked."""

    @property
    def edits(self) -> int:
        """Of all videos."""
        return sum(len(video.edits) for video in self.videos)


def numbered(edits: Iterable[SuiteEdit]) -> tuple[SuiteEdit, ...]:
    """Edits without a name are called by their category, and numbered where it has several."""
    named, counts = list[SuiteEdit](), dict[str, int]()
    for edit in edits:
        if not edit.name:
            count = counts[edit.category] = counts.get(edit.category, 0) + 1
            edit = replace(edit, name=edit.category if count == 1 else f"{edit.category}-{count}")
        named.append(edit)
    return tuple(named)
