"""What a file or folder of ours is: made of what, how, how large, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_opt.clip_folder import ClipFolder
from tav_opt.config import InputError, PathLike
from tav_opt.contract import CLIP_NAME, MAX_PROMPTS, ClipInfo
from tav_opt.repository import clips, layout, specs
from tav_opt.video.containers import LOCAL, still

Facts = dict[str, Any]
"""By name; JSON."""


def about(path: PathLike) -> Facts:
    """The facts of a checkpoint, an exported clip, a model repository, or an edit in a file; `kind` says which.

    Raises InputError for anything else, and for what is damaged.
    """
    given = Path(path)
    if layout.version_folder(given).is_dir():
        return _repository(given)
    if given.is_dir() and (clip := ClipFolder.found(given)) is not None:
        return _clip(clip)
    if given.exists() and not _half_written(given):
        return _edit(given)
    return _clip(ClipFolder.at(path))


def _half_written(path: Path) -> bool:
    return path.is_dir() and any(path.glob("resume*"))


def _edit(path: Path) -> Facts:
    from tav_opt import video

    settings = video.settings_of(path)
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    if path.is_file() and path.suffix.lower() == ".png":
        shown: Facts = dict(zip(("width", "height"), still(path, LOCAL).size, strict=True))
    else:
        clip = video.read(path)
        shown = dict(zip(("frames", "height", "width"), clip.frames.shape[:3], strict=True)) | {"fps": clip.fps}
    return {"kind": "edit", **shown, "bytes": size, "settings": settings}


def _described(info: ClipInfo) -> Facts:
    found = {"caption": info.prompt, "frames": info.frames, "height": info.height, "width": info.width, "fps": info.fps}
    found |= {"base": info.base, **({"additions": dict(info.additions)} if info.additions else {})}
    found |= {"base_hash": info.base_hash, "inversion_steps": info.inversion_steps}
    found |= {"inversion_iterations": info.inversion_iterations}
    found |= {} if info.window is None else {"window": info.window}
    return found | ({"edited_with": dict(info.edit)} if info.edit else {})


def _clip(clip: ClipFolder) -> Facts:
    size = sum(path.stat().st_size for path in clip.path.iterdir() if path.name in clip.files)
    found = {"kind": "exported clip" if clip.exported else "checkpoint", "name": clip.name, **_described(clip.info)}
    found |= {"tuned_values": _values(clip), "bytes": size}
    if clip.settings:
        found["tuned_with"] = {name: value for name, value in clip.settings.items() if name not in found}
    return found | (_memory_exported(clip) if clip.exported else _memory(clip.info))


def _values(clip: ClipFolder) -> Facts:
    """How many, in which tensors, of which kind: from the file's head alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(clip.path / "values.safetensors", "np") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 — not a mapping
    except (SafetensorError, OSError) as error:
        raise InputError(f"{clip.path / 'values.safetensors'} cannot be read: {error}") from None
    count = 0
    for one in slices:
        size = 1
        for side in one.get_shape():
            size *= side
        count += size
    return {"tensors": len(slices), "values": count, "dtype": ", ".join(sorted({one.get_dtype() for one in slices}))}


def _memory(info: ClipInfo) -> Facts:
    """Of a guided edit of one prompt in eager PyTorch, the model included; the reason where its base is not here."""
    import torch

    from tav_opt.base.directory import Base
    from tav_opt.memory import eager, outline

    if not Path(info.base).is_dir():
        return {"memory_unknown": f"the base {info.base} is not a folder here"}
    base = Base.at(info.base)
    kinds = {"float32": torch.float32, "float16": torch.float16}
    return {
        "memory_bytes": {
            name: eager.estimate_editing(outline.of(base, dtype), info.network_frames, info.height, info.width)
            for name, dtype in kinds.items()
        }
    }


def _memory_exported(clip: ClipFolder) -> Facts:
    """Of a guided edit of one prompt by onnxruntime on the processor: what is loaded, and what a run adds.

    And what each graph that was added to the base adds from the first edit on that asks for it.
    """
    from tav_opt.memory.graph import WorkingMemory, weights_bytes

    home, info = layout.base_of(clip.path), clip.info
    own = {path.stem: path for path in home.glob("*.onnx")}
    if not own:
        return {"memory_unknown": f"{home} holds no graphs"}
    added = {name: (own.pop(name), spec) for name, spec in specs.added(home).items() if name in own}
    rows = {"text_encoder": MAX_PROMPTS + 1, "unet": 2, "vae_decoder": min(4, info.frames)}
    held = 2 * sum(weights_bytes(path) for path in own.values())
    work = sum(WorkingMemory.of(own[name]).bytes(count) for name, count in rows.items() if name in own)
    values = (clip.path / "values.safetensors").stat().st_size
    found: Facts = {"loaded": held + values, "added by an edit": work}
    for name, (path, spec) in added.items():
        count = 3 if "self_source" in spec.further else rows["unet" if spec.is_unet else "vae_decoder"]
        found[f"with {name}"] = 2 * weights_bytes(path) + WorkingMemory.of(path).bytes(count)
    return {"memory_bytes": found}


def _repository(repository: Path) -> Facts:
    damaged: dict[str, str] = {}
    found = clips.clips(repository, on_damaged=lambda name, error: damaged.update({name: str(error)}))
    version = layout.version_folder(repository)
    return {
        "kind": "model repository",
        "bases": {folder.name: _base(folder) for folder in layout.folders(version / "base")},
        "clips": {
            clip.name: {**_described(clip.info), "exported_base": clip.info.exported_base, "bytes": clip.size}
            for clip in found
            if CLIP_NAME.match(clip.name)
        },
        **({"damaged": damaged} if damaged else {}),
    }


def _base(folder: Path) -> Facts:
    manifest: Mapping[str, Any] = layout.manifest(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    engines = {path.name: _size(path) for path in layout.folders(folder / layout.ENGINES)}
    edit = (manifest.get("edit") or {}).get("psnr")
    found = {"bytes": size, "made_by": manifest.get("versions", {})}
    return found | ({"edit_psnr": edit} if edit is not None else {}) | ({"engines_bytes": engines} if engines else {})


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
