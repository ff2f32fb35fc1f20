"""What a worker edits with, opened as its settings say; the same for whoever compares the server with its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tav_opt.config import WorkerConfig
from tav_opt.engines.exported import ExportedEngine, usable_cores
from tav_opt.files import user_cache
from tav_opt.memory.free import free_bytes
from tav_opt.memory.promises import LOCK, Memory
from tav_opt.serving.batching import Batches
from tav_opt.serving.decoding import Wanted, decode
from tav_opt.serving.edits import Editor, GoOn
from tav_opt.serving.inversions import Inversions
from tav_opt.serving.resident import Clips, OnChoice

MIB = 1 << 20


def open_editor(
    folder: Path,
    config: WorkerConfig,
    *,
    device: torch.device,
    instance: str = "",
    on_choice: OnChoice = lambda _base, _choice: None,
    on_trouble: Callable[[str], None] = lambda _: None,
) -> tuple[Editor, Clips]:
    """An editor of the clips of a version folder, and its clips; `instance` tells those of one server apart."""
    shared = _shared(folder / f".memory-{device}", on_trouble) if config.instances * config.batch_requests > 1 else None
    memory = Memory(partial(free_bytes, device), shared, instance)
    clips = Clips(
        folder,
        limit=config.clips_mib * MIB,
        device=device,
        engine=config.engine,
        threads=threads_of(config, device),
        memory=memory,
        on_choice=on_choice,
    )
    inversions = Inversions(
        memory_limit=config.inversions_mib * MIB,
        folder=cache_folder(config),
        disk_limit=config.cache_mib * MIB,
        on_trouble=on_trouble,
    )

    def decoded(data: bytes, wanted: Wanted, go_on: GoOn) -> np.ndarray:
        return decode(data, wanted, seconds=config.decode_seconds, keep_waiting=go_on)

    editor = Editor(
        clips=clips.get,
        inversions=inversions,
        decode=decoded,
        memory=memory,
        batches=Batches(on_trouble),
        longest_source=config.longest_source,
        windows_at_once=config.windows_at_once,
        response_bytes=config.response_mib * MIB,
    )
    return editor, clips


def _shared(folder: Path, on_trouble: Callable[[str], None]) -> Path | None:
    """The folder, made; None where it cannot be written."""
    try:
        folder.mkdir(exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        on_trouble(f"edits cannot tell each other what memory they need: {error}")
        return None
    return folder


def cache_folder(config: WorkerConfig) -> Path | None:
    """Where inversions are kept: the configured folder, else the user's cache folder; None where nothing shall be."""
    if not config.cache_mib:
        return None
    if config.cache is not None:
        return config.cache
    return user_cache() / "inversions"


def threads_of(config: WorkerConfig, device: torch.device) -> int | None:
    """An engine's threads: every core for one instance, else a share of them."""
    if device.type != "cpu" or config.instances == 1:
        return None
    return max(1, usable_cores() // config.instances)


def warm_up(engine: ExportedEngine) -> None:
    """Runs every graph of an edit once, so that the first request finds memory and kernels ready."""
    text = engine.encode_text(["", ""])
    window = engine.inverted_latents[:, :, : engine.info.network_frames]
    engine.predict(window.expand(2, -1, -1, -1, -1), 0, text)
    engine.decode(engine.source_latents[:, :, : engine.frames_at_once])
