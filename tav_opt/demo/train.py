"""Trains the models that ship with the package: `python -m tav_opt.demo.train --stage vae|text2image|…`.

Stages follow one another: text2image learns on the latents of the VAE as it is then. Each goes on where it was left:
weights, averages and optimizer lie in the folder, saved every minute. `--stage publish` puts the result into the
package.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tav_opt import command
from tav_opt.config import InputError
from tav_opt.demo import subjects
from tav_opt.demo.control import POOL as CONTROL_POOL
from tav_opt.demo.control import ControlStage
from tav_opt.demo.dual_encoder import DualEncoderStage
from tav_opt.demo.locator import LocatorStage
from tav_opt.demo.sizes import SHIPPED, SIZES, Size
from tav_opt.demo.text2image import Text2ImageStage
from tav_opt.demo.training import CPU, POOL, Progress, Run, Stage, to_unit
from tav_opt.demo.vae import VaeStage, psnr
from tav_opt.device import usable_device
from tav_opt.files import read_json, sha256, whole, write_json

SEED = 33
PACKAGE = Path(__file__).parent
SMOKE_POOL = 100
LICENCE = "LICENSE.fluent-emoji.txt"
"""Of the pictures that everything was learned from."""
WEIGHTS = {
    "vae": "model/vae",
    "unet": "model/unet",
    "text_encoder": "model/text_encoder",
    "clip": "clip_model",
    "locator": "locator",
    "control": "control",
}
"""Where each trained module lies in the package."""
PARTS = ("model", "clip_model", "locator", "control")
"""What is published beside the clips, as far as it is trained."""


def train(
    *,
    stage: Literal["vae", "text2image", "dual-encoder", "locator", "control", "publish"],
    minutes: float = 60,
    cool_down: bool = False,
    folder: Path = subjects.CACHE / "train",
    start_from: Path | None = None,
    smoke: bool = False,
    threads: int = 2,
    size: Literal[64, 128] = 64,
    device: str = "auto",
) -> None:
    """Trains a stage of the demo's models so many minutes more, going on where it was left.

    Args:
        stage: Which part; text2image needs the vae first; control learns on the model of the
            folder, or else on the package's. publish: copy the trained parts into the package.
        minutes: How long to train.
        cool_down: Let the learning rate fall to zero by then: for weights to publish.
        folder: Where the state lies, with a sheet of samples per stage.
        start_from: Folder with `model/` and `clip_model/` (such as `tav_opt/demo`) whose weights to begin with where
            the stage has no state yet.
        smoke: Learn generated shapes (no npm) with little data, in a folder of its own beside.
        threads: Processor cores.
        size: Pixels of a side, of vae and text2image: 64 as it ships, or 128 in a folder of its own beside, for a GPU.
        device: Where vae and text2image are trained: auto takes a GPU where there is one. The others need none.
    """
    if stage not in OF_PICTURES and (size != 64 or device not in ("auto", "cpu")):
        raise InputError(f"stage {stage} with size {size}, device {device}: only {' and '.join(OF_PICTURES)} have them")
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    if stage == "publish":
        publish(folder, PACKAGE)
        return
    folder = folder if size == 64 else folder / str(size)
    place = folder / "smoke" if smoke else folder
    pictures = subjects.shapes() if smoke else subjects.sprites()
    pool, chosen = SMOKE_POOL if smoke else POOL, usable_device(device)
    STAGES[stage](Job(pictures, place, minutes, cool_down, pool, start_from, SIZES[size], chosen))


@dataclass(frozen=True)
class Job:
    """What a stage is trained on, where, and how long."""

    sprites: Mapping[str, Sequence[Image.Image]]
    folder: Path
    minutes: float
    cool_down: bool
    pool: int
    start_from: Path | None
    size: Size = SHIPPED
    device: torch.device = CPU

    def run(self, stage: Stage) -> Run:
        """The stage's run as it was left, or begun with given weights."""
        if self.start_from is not None:
            for name, module in stage.modules.items():
                file = next((self.start_from / WEIGHTS[name]).glob("*.safetensors"), None)
                if file is None:
                    raise InputError(f"{self.start_from / WEIGHTS[name]} holds no weights to start from")
                _begin_with(module, file)
        return Run(stage, self.folder, SEED)


def _begin_with(module: torch.nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(file))
    except RuntimeError:
        raise InputError(f"{file} holds the weights of another network than this size's") from None


def train_vae(job: Job) -> None:
    """Trains the VAE and writes it to `vae/` with the scaling factor that its latents call for."""
    stage, folder = VaeStage(job.sprites, job.size, pool=job.pool, device=job.device), job.folder
    run = job.run(stage)
    progress = run.train(minutes=job.minutes, cool_down=job.cool_down)
    run.swap()
    with torch.no_grad():
        latents = stage.vae.encode(to_unit(stage.test).to(job.device)).latent_dist.mean
    stage.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    _replace(folder / "vae", stage.vae.save_pretrained)
    _record(folder, stage.name, progress, psnr_db=round(psnr(stage.test, stage.reconstruct(stage.test)), 2))


def train_text2image(job: Job) -> None:
    """Trains UNet and text encoder and writes all parts to `model/`, a Stable Diffusion directory in fp16."""
    folder = job.folder
    vae_weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if not vae_weights.is_file():
        raise InputError(f"{vae_weights} does not exist: train --stage vae first")
    learned_on = read_json(_record_file(folder)).get("text2image", {}).get("vae", sha256(vae_weights))
    if learned_on != sha256(vae_weights):
        raise InputError(f"the VAE changed after text2image.pt learned its latents: remove {folder / 'text2image.pt'}")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    stage = Text2ImageStage(job.sprites, vae, job.size, pool=job.pool, device=job.device)
    run = job.run(stage)
    _record(folder, stage.name, run.progress, vae=learned_on)
    progress = run.train(minutes=job.minutes, cool_down=job.cool_down)
    run.swap()
    pipeline = StableDiffusionPipeline(
        vae=stage.vae.half(),
        text_encoder=stage.text_encoder.half(),
        tokenizer=stage.tokenizer,
        unet=stage.unet.half(),
        scheduler=stage.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )

    def save(target: Path) -> None:
        pipeline.save_pretrained(target)
        _load_as_float(target / "text_encoder")
        config = read_json(target / "vae" / "config.json")
        config.pop("_name_or_path", None)  # where it lay on this machine
        write_json(target / "vae" / "config.json", config)

    _replace(folder / "model", save)
    _record(folder, stage.name, progress, vae=learned_on)


def train_dual_encoder(job: Job) -> None:
    """Trains the dual encoder and writes it to `clip_model/`, a CLIPModel directory with its processor in fp16."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor  # which not every version has that trains the rest

    stage, folder = DualEncoderStage(job.sprites), job.folder
    run = job.run(stage)
    progress = run.train(minutes=job.minutes, cool_down=job.cool_down)
    run.swap()
    accuracies = {part: round(value, 3) for part, value in stage.accuracies().items()}
    half = [0.5, 0.5, 0.5]
    side = stage.test.shape[1]
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    processor = CLIPProcessor(images, stage.tokenizer)

    def save(target: Path) -> None:
        stage.clip.half().save_pretrained(target)
        _load_as_float(target)
        processor.save_pretrained(target)

    _replace(folder / "clip_model", save)
    _record(folder, stage.name, progress, accuracy_on_held_out_composites=accuracies)


def train_locator(job: Job) -> None:
    """Trains what finds the subject's middle and writes it to `locator/`."""
    stage, folder = LocatorStage(job.sprites), job.folder
    run = job.run(stage)
    progress = run.train(minutes=job.minutes, cool_down=job.cool_down)
    run.swap()
    error = round(stage.error(), 2)

    def save(target: Path) -> None:
        target.mkdir()
        save_file(stage.locator.half().state_dict(), target / "model.safetensors")

    _replace(folder / "locator", save)
    _record(folder, stage.name, progress, pixels_off_on_held_out_composites=error)


def train_control(job: Job) -> None:
    """Trains what places the subject and writes it to `control/`, a T2IAdapter directory in fp16."""
    folder = job.folder
    model = next(place for place in (folder / "model", PACKAGE / "model") if place.is_dir())
    stage = ControlStage(job.sprites, model, pool=min(job.pool, CONTROL_POOL))
    if job.start_from is None and not (folder / f"{stage.name}.pt").is_file():
        stage.begin()
    run = job.run(stage)
    progress = run.train(minutes=job.minutes, cool_down=job.cool_down)
    run.swap()
    _replace(folder / "control", stage.adapter.half().save_pretrained)
    _record(folder, stage.name, progress, unet=sha256(next((model / "unet").glob("*.safetensors"))))


OF_PICTURES = ("vae", "text2image")
STAGES: dict[str, Callable[[Job], None]] = {
    "vae": train_vae,
    "text2image": train_text2image,
    "dual-encoder": train_dual_encoder,
    "locator": train_locator,
    "control": train_control,
}


def _load_as_float(folder: Path) -> None:
    """Lets transformers load fp16 weights in fp32, as diffusers does with the parts beside them."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"dtype": "float32"})


def _replace(target: Path, save: Callable[[Path], Any]) -> None:
    """Writes a folder anew; the old one goes once the new one is whole."""
    fresh = target.with_name(f"{target.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    with whole(fresh) as temporary:
        save(temporary)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _record_file(folder: Path) -> Path:
    return folder / "training.json"


def _record(folder: Path, stage: str, progress: Progress, **measured: Any) -> None:
    """Notes how a stage was trained beside its state."""
    file = _record_file(folder)
    record = read_json(file) if file.is_file() else {}
    record["data"] = {"stills": subjects.STILLS, "animations": subjects.ANIMATIONS, "subjects": "emoji.py"}
    record["versions"] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    record["machine"] = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record["seed"] = SEED
    record[stage] = {
        "steps": progress.step,
        "hours": round(progress.seconds / 3600, 3),
        "loss": round(progress.loss, 5),
        "curve": progress.curve[:: max(1, len(progress.curve) // 20)],
    } | measured
    write_json(file, record)


def publish(folder: Path, target: Path) -> None:
    """Copies the parts that are trained, with a model its clips too, and notes in the model's record how they were.

    Raises InputError without a model, in the folder or there already.
    """
    from tav_opt.demo.clips import make_clips  # which writes videos; machines that only train may lack what does

    if not any((place / "model").is_dir() for place in (folder, target)):
        raise InputError(f"{folder / 'model'} does not exist: train --stage text2image first")
    trained = [part for part in PARTS if (folder / part).is_dir()]
    record, known = target / "model" / "training.json", read_json(_record_file(folder))
    if "model" not in trained:  # the record of what is there stays
        known = read_json(record) | {stage: known[stage] for stage in STAGES if stage in known}
    for part in trained:
        _replace(target / part, partial(shutil.copytree, folder / part))
    if "model" in trained:
        make_clips(target / "clips")
        trained.append("clips")
    for part in trained:
        shutil.copy(PACKAGE / LICENCE, target / part / LICENCE)
    write_json(record, known)


def main() -> int:
    """The command line."""
    import tyro  # not on machines for the GPU's stages, which train without this command

    return command.run("python -m tav_opt.demo.train", lambda arguments: tyro.cli(train, args=arguments))


if __name__ == "__main__":
    sys.exit(main())
