"""The demo's text-to-image model of 128×128, trained some minutes more at each call, and judged as today's is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import sprites
import torch
from report import Report

from tav_opt.demo import subjects, world
from tav_opt.demo.dual_encoder import phrase_of
from tav_opt.demo.judge import Judge
from tav_opt.demo.places import PLACES
from tav_opt.demo.sizes import LARGE
from tav_opt.demo.text2image import Text2ImageStage
from tav_opt.demo.train import Job, train_text2image, train_vae
from tav_opt.demo.training import POOL
from tav_opt.files import read_json

FOLDER = Path(__file__).parents[2] / "demo-out" / "gpu-training"
"""Stays on the machine from call to call; what is trained goes on there."""
MINUTES = 7.0
"""Of one call, whose limit is nine."""
NARROW = replace(LARGE, vae_widths=(8, 8, 16, 16), unet_widths=(32, 32, 64), vae_batch=4, batch=4)
"""What a dry run trains."""
PROMPTS, SEED, BATCH = 200, 72, 50


def vae(report: Report) -> None:
    """Learns to encode pictures; once text2image has begun, it must not change."""
    with _job(report) as job:
        train_vae(job)
        _told(report, job, "vae", {"psnr_db": "PSNR dB"})
        _beside(report, job, "vae.png")


def pictures(report: Report) -> None:
    """Learns pictures from text on the VAE's latents; call it as often as there is time."""
    with _job(report) as job:
        if not (job.folder / "vae").is_dir():
            if not report.dry:
                report.fault("text2image", "no VAE is there yet: run the stage demo-vae first")
                return
            train_vae(job)
        train_text2image(job)
        _told(report, job, "text2image", {})
        _judge(report, job)
        _beside(report, job, "text2image.png")
        path = report.beside("demo128.zip")
        with ZipFile(path, "w", ZIP_STORED) as file:  # fp16 weights do not shrink
            for part in sorted((job.folder / "model").rglob("*.*")):
                file.write(part, part.relative_to(job.folder / "model"))
        report.figures("the model", {"MB": path.stat().st_size / 1e6})


@contextmanager
def _job(report: Report) -> Iterator[Job]:
    """The job of one call: on a card in FOLDER; dry for a step or two on a few shapes, in a folder that goes."""
    if not report.dry:
        known = sprites.unpack(sprites.PACKED) if sprites.PACKED.is_file() else subjects.sprites()
        yield Job(known, FOLDER, MINUTES, True, POOL, None, LARGE, report.device)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Job(subjects.shapes(), Path(folder), 0.005, True, 50, None, NARROW, report.device)


def _told(report: Report, job: Job, stage: str, more: dict[str, str]) -> None:
    record: dict[str, Any] = read_json(job.folder / "training.json")[stage]
    figures = {"steps": record["steps"], "minutes": 60 * record["hours"], "loss": record["loss"]}
    report.figures(stage, figures | {told: record[name] for name, told in more.items()})


def _judge(report: Report, job: Job) -> None:
    """Held-out prompts, as benchmarks/quality.py has them: how many pictures the demo's judge finds right."""
    rng, names = np.random.default_rng(SEED), list(job.sprites)
    count = 4 if report.dry else PROMPTS
    judged = [name for name in names if name in subjects.JUDGED] or names
    scenes: list[world.Scene] = []
    while len(scenes) < count:
        scene = world.draw_scene(rng, names, kept_out=True)
        scenes += [scene] if scene.subject in judged else []
    made = _pictures(job, scenes, steps=2 if report.dry else 25)
    small = made.reshape(count, world.SIZE, 2, world.SIZE, 2, 3).mean((2, 4)).round().astype(np.uint8)  # the judge's
    judge, kinds = Judge.open(), {"subject": judged, "place": list(PLACES), "style": list(world.STYLES)[1:]}
    figures = {}
    for part, known in kinds.items():
        shown = [i for i, scene in enumerate(scenes) if getattr(scene, part) in known]
        if shown:
            found = judge.classify(small[shown], [phrase_of(part, name) for name in known])
            right = [known[answer] == getattr(scenes[i], part) for answer, i in zip(found, shown, strict=True)]
            figures[f"right {part} %"] = 100 * float(np.mean(right))
    report.figures("pictures of held-out prompts", figures)


@torch.no_grad()
def _pictures(job: Job, scenes: Sequence[world.Scene], *, steps: int) -> np.ndarray:
    """uint8 (scenes, 128, 128, 3) by the model that was written."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    model = job.folder / "model"
    stage = Text2ImageStage(job.sprites, AutoencoderKL.from_pretrained(model / "vae"), job.size, device=job.device)
    stage.unet = UNet2DConditionModel.from_pretrained(model / "unet").to(job.device).eval()
    stage.text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder").to(job.device).eval()  # nosec B615  # a folder
    prompts = [world.prompt(scene) for scene in scenes]
    parts = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
    return np.concatenate(
        [stage.generate(part, steps=steps, guidance_scale=5.0, seed=i) for i, part in enumerate(parts)]
    )


def _beside(report: Report, job: Job, name: str) -> None:
    """The sheet, to look at."""
    report.beside(f"demo128-{name}").write_bytes((job.folder / name).read_bytes())
