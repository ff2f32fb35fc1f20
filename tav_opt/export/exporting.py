"""Exports a tuned clip into a model repository: its base's graphs once, its own values each time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt import checkpoint, models
from tav_opt.checkpoint import LATENTS, VALUES, Checkpoint
from tav_opt.config import Additions, ClipConfig, InputError, InversionConfig, OnProgress, PathLike
from tav_opt.contract import VERSION, check_clip_name
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.engines.onnxruntime import OnnxGraphs, load_onnxruntime
from tav_opt.engines.pytorch import TorchEngine, base_of
from tav_opt.export import additions, conditions, graphs, parity, reference_checkpoint, whole_edit
from tav_opt.export.additions import Further
from tav_opt.export.parity import OnGraph
from tav_opt.export.whole_edit import OnEdit
from tav_opt.files import check_place, discard, whole, write_json
from tav_opt.models import StableDiffusion
from tav_opt.repository import layout, specs
from tav_opt.repository.clips import Clip, described
from tav_opt.repository.layout import (
    MANIFEST,
    base_folder,
    check_unaltered,
    clip_folder,
    hashes,
    locked,
    version_folder,
    within,
)
from tav_opt.repository.model_files import write_model_files

_PACKAGES = ("tav-opt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "tokenizers")


def export(
    checkpoint_dir: PathLike,
    repository: PathLike,
    *,
    name: str | None = None,
    base: PathLike | Additions | None = None,
    source: ClipConfig | None = None,
    prompt: str | None = None,
    inversion: InversionConfig = InversionConfig(),  # noqa: B008 — frozen
    controlnets: Mapping[str, PathLike] = MappingProxyType({}),
    adapters: Mapping[str, PathLike] = MappingProxyType({}),
    further: Iterable[Further] = (),
    on_graph: OnGraph | None = None,
    on_edit: OnEdit | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Exports a tuned clip into a model repository and returns its folder; a clip of that name is replaced.

    `name` is the folder's unless given; `base` says where the base model is now. The base's graphs are written when no
    clip of the same base and size is there yet, else only values are copied; `controlnets` and `adapters`, places by
    name, and `further` graphs are added to it where it lacks them, and change nothing for the clips that are there. A
    directory that the reference saved needs `source` and `prompt`, and is inverted by `inversion`. Raises InputError,
    and ParityError for a graph, or a whole edit, that departs from eager PyTorch: either way nothing is written.
    """
    checkpoint_dir = Path(checkpoint_dir)
    name = check_clip_name(name if name is not None else name_of(checkpoint_dir))
    version = version_folder(repository)
    for place in (base_folder(version, name), clip_folder(version, name)):
        check_place(place)
    if reference_checkpoint.is_reference(checkpoint_dir):
        if source is None or prompt is None:
            raise InputError(
                f"{checkpoint_dir} was saved by the reference, which keeps no clip: give --video and --prompt"
            )
        if base is not None:
            given = ", ".join(base.given()) if isinstance(base, Additions) else f"--base {base}"
            raise InputError(f"{given}: {checkpoint_dir} is a whole model, and its own base")
        tuned = reference_checkpoint.read(checkpoint_dir, source, prompt, inversion)
    else:
        if source is not None or prompt is not None:
            raise InputError(f"--video and --prompt are for what the reference saved; {checkpoint_dir} has its own")
        tuned = checkpoint.load(checkpoint_dir)
    with locked(version):
        exported = within(version, base_folder(version, tuned.info.exported_base))
        further = [*conditions.further(controlnets, adapters, exported), *further]
        if not exported.exists():
            _write_base(tuned, exported, base, further, on_graph, on_edit, on_progress)
        _check_values(tuned, exported)
        if lacking := additions.lacking(exported, further):
            check_unaltered(exported)
            sd, values = _model(tuned, base)
            additions.add(exported, lacking, sd, values, on_graph, on_progress)
        write_model_files(Path(repository))
        return _write_clip(tuned, within(version, clip_folder(version, name)))


@dataclass(frozen=True, kw_only=True)
class Added:
    """What adding a clip took; `graphs` says whether its base had to be exported."""

    clip: Clip
    seconds: float
    graphs: bool


def add(
    checkpoint_dir: PathLike, repository: PathLike, *, name: str | None = None, base: PathLike | Additions | None = None
) -> Added:
    """Exports a tuned clip and tells what that took; raises as `export` does."""
    before = set(version_folder(repository).glob("base/*"))
    start = time.perf_counter()
    clip = described(export(checkpoint_dir, repository, name=name, base=base))
    seconds = time.perf_counter() - start
    bases = {path.name for path in before}
    return Added(clip=clip, seconds=seconds, graphs=clip.info.exported_base not in bases)


def name_of(folder: Path) -> str:
    """What a checkpoint's clip is called unless told: the folder's name, or the link's that leads to it."""
    return re.sub(r"[^a-z0-9_-]+", "-", Path(os.path.abspath(folder)).name.lower()).strip("-_")[:63]


def _check_values(tuned: Checkpoint, exported: Path) -> None:
    if (found := layout.manifest(exported).get("version")) != VERSION:
        raise InputError(f"{exported}: version {found!r} is not {VERSION}: choose another --repository")
    specs.check_values(exported, {name: value.shape for name, value in tuned.values.items()})


def _write_base(
    tuned: Checkpoint,
    exported: Path,
    base: PathLike | Additions | None,
    further: Sequence[Further],
    on_graph: OnGraph | None,
    on_edit: OnEdit | None,
    on_progress: OnProgress | None,
) -> None:
    load_onnxruntime()  # before a model is loaded and its first graph is written, which it then compares
    sd, values = _model(tuned, base)
    shape = graphs.network_shape(tuned.info, tuned.source_latents)
    for one in further:
        one.make(sd, values, shape)  # a network that does not fit is refused before the first graph is written
    with whole(exported) as folder:
        folder.mkdir()
        found = {}
        chosen = graphs.graphs(sd, values, shape)
        for number, graph in enumerate(chosen, start=1):
            found[graph.name] = parity.check(graph, parity.in_onnxruntime(graphs.write(graph, folder), graph.spec))
            if on_graph is not None:
                on_graph(graph.name, found[graph.name])
            if on_progress is not None:
                on_progress("export", number, len(chosen))
        _tokenizer(sd).save(str(folder / "tokenizer.json"))
        manifest = _base_manifest(tuned, sd, found, folder) | {"graphs": [asdict(graph.spec) for graph in chosen]}
        write_json(folder / MANIFEST, manifest)  # by which it is opened
        edit = _whole_edit(tuned, sd, folder, on_progress)
        if on_edit is not None:
            on_edit("onnxruntime", edit)
        write_json(folder / MANIFEST, manifest | {"edit": edit.to_json()})
        additions.add(folder, further, sd, values, on_graph, on_progress)


def _model(tuned: Checkpoint, base: PathLike | Additions | None) -> tuple[StableDiffusion, dict[str, Tensor]]:
    """A clip's base with its values, which are given too."""
    sd = models.load(base_of(tuned.info, base))
    values = {name: value.float() for name, value in tuned.values.items()}
    models.put_values(sd.unet, values)
    return sd, values


def _whole_edit(
    tuned: Checkpoint, sd: StableDiffusion, folder: Path, on_progress: OnProgress | None
) -> whole_edit.EditParity:
    """Of the graphs in a folder that has no name yet, in onnxruntime on the processor."""
    opened = ExportedBase.open(folder, "onnxruntime", partial(OnnxGraphs, folder, tuned.info, torch.device("cpu")))
    eager = TorchEngine(
        sd=sd, info=tuned.info, source_latents=tuned.source_latents, inverted_latents=tuned.inverted_latents
    )
    return whole_edit.check(ExportedEngine.of(tuned, opened, opened.revision), eager, whole_edit.FULL, on_progress)


def _tokenizer(sd: StableDiffusion) -> Tokenizer:
    """The tokenizer in one file that needs no transformers; pads, and never cuts."""
    tokenizer = Tokenizer.from_str(sd.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.enable_padding(
        length=sd.tokenizer.model_max_length, pad_id=sd.tokenizer.pad_token_id, pad_token=sd.tokenizer.pad_token
    )
    return tokenizer


def _base_manifest(
    tuned: Checkpoint, sd: StableDiffusion, found: dict[str, parity.Parity], folder: Path
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "base_hash": tuned.info.base_hash,
        "latents": list(graphs.network_shape(tuned.info, tuned.source_latents)),
        "tokens": sd.tokenizer.model_max_length,
        "scaling_factor": sd.vae.config.scaling_factor,
        "scheduler": sd.base.configs["scheduler"],
        "parity": {name: result.to_json() for name, result in found.items()},
        "versions": {package: metadata.version(package) for package in _PACKAGES},
        "files": hashes(folder),
    }


def _write_clip(tuned: Checkpoint, folder: Path) -> Path:
    """Writes a clip beside the one of its name, if there is one, and takes its place at once."""
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("fresh", "old"))
    latents = {"source": tuned.source_latents.contiguous(), "inverted": tuned.inverted_latents.contiguous()}
    with whole(fresh) as temporary:
        temporary.mkdir()
        checkpoint.save_tensors(tuned.values, temporary / VALUES)
        checkpoint.save_tensors(latents, temporary / LATENTS)
        checkpoint.save_sound(tuned.sound, temporary)
        write_json(temporary / MANIFEST, {**tuned.info.to_json(), "files": hashes(temporary)})
    if folder.exists() or folder.is_symlink():
        os.replace(folder, old)
    os.replace(fresh, folder)
    discard(old)
    return folder
