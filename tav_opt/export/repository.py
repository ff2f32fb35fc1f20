"""The model repository that Triton Inference Server is pointed at: bases, exported once, and the clips on them."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tav_opt import checkpoint, models
from tav_opt.checkpoint import LATENTS, VALUES, Checkpoint
from tav_opt.config import ClipConfig, InputError, TrainConfig
from tav_opt.contract import STREAM_MODEL, VERSION, check_clip_name
from tav_opt.export import graphs, parity, reference
from tav_opt.files import read_json, sha256, whole, write_json
from tav_opt.model_repository import write_model_files
from tav_opt.models import StableDiffusion

OnGraph = Callable[[str, parity.Parity], object]
"""Called with the name of each graph that was exported, and how far it is from eager PyTorch."""

MANIFEST = "manifest.json"
_PACKAGES = ("tav-opt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "tokenizers")


def export(
    checkpoint_dir: Path,
    repository: Path,
    *,
    name: str | None = None,
    base: str | None = None,
    source: ClipConfig | None = None,
    prompt: str | None = None,
    inversion_steps: int = TrainConfig.inversion_steps,
    on_graph: OnGraph | None = None,
) -> Path:
    """Exports a tuned clip into a model repository and returns its folder; a clip of that name is replaced.

    `name` is the folder's unless given; `base` says where the base model is now. The base's graphs are written when no
    clip of the same base and size is there yet, else only values are copied. A directory that the reference saved
    needs `source` and `prompt`, and is inverted in `inversion_steps`. Raises InputError, and ParityError for a graph
    that departs from eager PyTorch: either way nothing is written.
    """
    checkpoint_dir = Path(checkpoint_dir)
    name = check_clip_name(name if name is not None else _name_of(checkpoint_dir))
    if reference.is_reference(checkpoint_dir):
        if source is None or prompt is None:
            raise InputError(
                f"{checkpoint_dir} was saved by the reference, which keeps no clip: give --video and --prompt"
            )
        if base is not None:
            raise InputError(f"--base {base}: {checkpoint_dir} is a whole model, and its own base")
        tuned = reference.read(checkpoint_dir, source, prompt, inversion_steps)
    else:
        if source is not None or prompt is not None:
            raise InputError(f"--video and --prompt are for what the reference saved; {checkpoint_dir} has its own")
        tuned = checkpoint.load(checkpoint_dir)
    folder = Path(repository) / STREAM_MODEL / str(VERSION)
    with locked(folder):
        exported = folder / "base" / tuned.info.exported_base
        if not exported.exists():
            _write_base(tuned, exported, base, on_graph)
        _check_values(tuned, exported)
        write_model_files(Path(repository))
        return _write_clip(tuned, folder / "clips" / name)


def _name_of(folder: Path) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", folder.resolve().name.lower()).strip("-_")[:63]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One export at a time: the second of two that need the same base finds it there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_values(tuned: Checkpoint, exported: Path) -> None:
    manifest = read_json(exported / MANIFEST)
    if manifest.get("version") != VERSION or set(manifest["values"]) != set(tuned.values):
        raise InputError(f"{exported} takes other values than this clip tuned: choose another --repository")


def _write_base(tuned: Checkpoint, exported: Path, base: str | None, on_graph: OnGraph | None) -> None:
    info = tuned.info
    sd = models.load(models.checked_base(base or info.base, info.base_hash))
    values = {name: value.float() for name, value in tuned.values.items()}
    models.put_values(sd.unet, values)
    with whole(exported) as folder:
        folder.mkdir()
        found = {}
        for graph in graphs.graphs(sd, values, tuned.source_latents.shape[1:]):
            found[graph.name] = parity.check(graph, graphs.write(graph, folder))
            if on_graph is not None:
                on_graph(graph.name, found[graph.name])
        _tokenizer(sd).save(str(folder / "tokenizer.json"))
        write_json(folder / MANIFEST, _base_manifest(tuned, sd, found, folder))


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
        "latents": list(tuned.source_latents.shape[1:]),
        "tokens": sd.tokenizer.model_max_length,
        "scaling_factor": sd.vae.config.scaling_factor,
        "scheduler": read_json(sd.path / "scheduler" / "scheduler_config.json"),
        "values": {name: graphs.input_name(name) for name in tuned.values},
        "parity": {name: result.to_json() for name, result in found.items()},
        "versions": {package: version(package) for package in _PACKAGES},
        "files": hashes(folder),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of all files in a folder."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _write_clip(tuned: Checkpoint, folder: Path) -> Path:
    """Writes a clip beside the one of its name, if there is one, and takes its place at once."""
    fresh, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("fresh", "old"))
    for left in (fresh, old):  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    latents = {"source": tuned.source_latents.contiguous(), "inverted": tuned.inverted_latents.contiguous()}
    with whole(fresh) as temporary:
        temporary.mkdir()
        checkpoint.save_tensors(tuned.values, temporary / VALUES)
        checkpoint.save_tensors(latents, temporary / LATENTS)
        write_json(temporary / MANIFEST, {**tuned.info.to_json(), "files": hashes(temporary)})
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
