"""How good the package's small model is, judged by its dual encoder and locator: `python benchmarks/quality.py --help`.

The judge is tested first, on composites of the real pictures whose combinations nobody was trained on (npm fetches the
pictures). Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import options
import torch
import tyro
from common import Figure, header, machine
from crossings import DEMO, EDITS, NAMES, PACKAGE, scores, sources, tuned
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from tav_opt import command, editing
from tav_opt.demo import subjects, world
from tav_opt.demo.dual_encoder import phrase_of
from tav_opt.demo.judge import Judge
from tav_opt.demo.training import grid, to_images, to_unit
from tav_opt.demo.vae import psnr
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import read_json, write_json
from tav_opt.video import contact_sheet

SEED = 71
"""Of the pictures and prompts, unlike any of training."""
BATCH = 20
TUNING_SECONDS = 90

Part = Literal["judge", "images", "videos", "options"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Judges the judge, pictures from text, edits of the package's clips, and what every option does."""

    parts: tuple[Part, ...] = get_args(Part)
    composites: int = 1000
    prompts: int = 200
    seeds: int = 4
    steps: int = 25
    guidance: float = 5.0
    """Of pictures from text; edits have the demo's."""
    model: Path = PACKAGE / "model"
    """A diffusers directory whose pictures from text are judged; the rest is the package's."""
    folder: Path = Path("demo-out/quality")
    """Tuned clips and sheets."""
    out: Path = Path("benchmarks/results/quality.json")
    options_out: Path = Path("benchmarks/results/options.json")
    """The options' table; what stands there is not measured anew."""
    only: tuple[str, ...] = ()
    """Options to measure, as the table names them; none: all."""


def main(config: Quality) -> int:
    """Prints a table a part, keeps figures and sheets; returns the exit status."""
    config.folder.mkdir(parents=True, exist_ok=True)
    judge, figures = Judge.open(), dict[str, list[Figure]]()
    run = {"judge": judge_the_judge, "images": judge_images, "videos": judge_videos, "options": judge_options}
    for part in config.parts:
        figures[part] = run[part](judge, config)
        print(f"\n### {part}\n\n| figure | measured | goal | met |\n|---|---:|---|---|")
        print("\n".join(map(str, figures[part])), flush=True)
    print(header("\nquality of the package's small model"))
    _keep(figures, config.out)
    return int(not all(figure.met for found in figures.values() for figure in found))


def _keep(figures: dict[str, list[Figure]], out: Path) -> None:
    """Writes what was measured; the parts that were not stay as they were."""
    run = {"command": " ".join(sys.argv), "machine": machine()}
    content = read_json(out) if out.is_file() else {}
    content |= {part: run | {"figures": [vars(figure) for figure in found]} for part, found in figures.items()}
    write_json(out, content)


def _share(name: str, value: float, least: float) -> Figure:
    return Figure(name=name, value=100 * value, unit="%", goal=f"≥ {100 * least:.0f} %", met=value >= least)


def _scenes(count: int, rng: np.random.Generator) -> list[world.Scene]:
    """Held-out scenes, as many of each judged subject (to within one)."""
    names, found = list(subjects.JUDGED | subjects.FURTHER), list[world.Scene]()
    left = dict.fromkeys(subjects.JUDGED, math.ceil(count / len(subjects.JUDGED)))
    while len(found) < count:
        scene = world.draw_scene(rng, names, kept_out=True)
        if left.get(scene.subject, 0):
            left[scene.subject] -= 1
            found.append(scene)
    return found


def _recognised(judge: Judge, images: np.ndarray, scenes: Sequence[world.Scene], part: str) -> float:
    """Part of the pictures in which the scene's subject, place or style is the nearest of all."""
    names = NAMES[part]
    shown = [index for index, scene in enumerate(scenes) if getattr(scene, part) in names]
    found = judge.classify(images[shown], [phrase_of(part, name) for name in names])
    right = [names[answer] == getattr(scenes[index], part) for answer, index in zip(found, shown, strict=True)]
    return float(np.mean(right))


def judge_the_judge(judge: Judge, config: Quality) -> list[Figure]:
    """The judge, and the VAE, on held-out composites of the real pictures."""
    rng, sprites = np.random.default_rng(SEED), subjects.sprites()
    scenes = _scenes(config.composites, rng)
    pictures, middles = zip(*(world.compose_at(scene, sprites, rng) for scene in scenes), strict=True)
    images = np.stack(pictures)
    off = float(np.linalg.norm(judge.track(images) - np.array(middles), axis=1).mean())
    vae = AutoencoderKL.from_pretrained(PACKAGE / "model" / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        back = to_images(vae.decode(vae.encode(to_unit(images[:200])).latent_dist.mean).sample)
    ratio = psnr(images[:200], back)
    return [
        _share("composites: right subject of 50", _recognised(judge, images, scenes, "subject"), 0.9),
        _share("composites: right place", _recognised(judge, images, scenes, "place"), 0.95),
        _share("composites: right style", _recognised(judge, images, scenes, "style"), 0.95),
        Figure(name="composites: distance from the subject's middle", value=off, unit="pixels", goal="", met=True),
        Figure(name="composites: PSNR after the VAE", value=ratio, unit="dB", goal="≥ 26 dB", met=ratio >= 26),
    ]


def pictures_of(model: Path) -> StableDiffusionPipeline:
    """diffusers' own pipeline of a model."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def judge_images(judge: Judge, config: Quality) -> list[Figure]:
    """Pictures from text by diffusers' own pipeline, of held-out prompts."""
    pipeline = pictures_of(config.model)
    scenes = _scenes(config.prompts, np.random.default_rng(SEED + 1)) * config.seeds
    pictures = []
    for first in tqdm(range(0, len(scenes), BATCH), desc="pictures", leave=False, disable=None):
        made = pipeline(
            [world.prompt(scene) for scene in scenes[first : first + BATCH]],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=torch.Generator().manual_seed(SEED + first),
            output_type="np",
        ).images
        pictures.append((made * 255).round().astype(np.uint8))
    images = np.concatenate(pictures)
    page = Image.fromarray(grid(images[:96], 12))
    page.resize((page.width * 2, page.height * 2), Image.Resampling.LANCZOS).save(config.folder / "images.png")
    return [
        _share("pictures: right subject of 50", _recognised(judge, images, scenes, "subject"), 0.7),
        _share("pictures: right place", _recognised(judge, images, scenes, "place"), 0.9),
        _share("pictures: right style", _recognised(judge, images, scenes, "style"), 0.85),
    ]


def _listed(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def judge_videos(judge: Judge, config: Quality) -> list[Figure]:
    """Edits of subject, place, style and two at once, of every clip; each clip's sheet lies in the folder."""
    found, seconds = list[dict[str, float]](), list[float]()
    for source in sources():
        began, folder = time.perf_counter(), config.folder / source.name
        fresh = not folder.exists()
        tuned(source, folder)
        seconds += [time.perf_counter() - began] if fresh else []
        engine = open_checkpoint(folder)
        rows, captions = [source.clip.frames], [source.caption]
        for change in tqdm(EDITS[source.name], desc=source.name, leave=False, disable=None):
            prompt = world.prompt(source.edited(change))
            frames = editing.edit(engine, DEMO.edit_config(prompt))[0]
            found.append(scores(judge, frames, source, change))
            rows.append(frames)
            captions.append(prompt)
            print(
                f"{captions[-1]}: " + ", ".join(f"{name} {value:.2f}" for name, value in found[-1].items()), flush=True
            )
        Image.fromarray(contact_sheet.contact_sheet(rows, captions)).save(config.folder / f"{source.name}.png")
    right, track, unrest = (
        float(np.mean([score[name] for score in found])) for name in ("right frames", "track", "unrest around")
    )
    figures = [
        _share(f"edits: right target, frames of {len(found)} prompts", right, 0.8),
        Figure(name="edits: track against the source's", value=track, unit="", goal="≥ 0.9", met=track >= 0.9),
        Figure(
            name="edits: unrest around the subject",
            value=unrest,
            unit="× the source's",
            goal="≤ 1.5",
            met=unrest <= 1.5,
        ),
    ]
    if seconds:
        longest = max(seconds)
        figures.append(Figure(name="tuning", value=longest, unit="s", goal="≤ 90 s", met=longest <= TUNING_SECONDS))
    return figures


def _no_less(name: str, part: str, column: str, given: dict[str, Any], plain: dict[str, Any]) -> Figure:
    """An option's column, of the edits that change that part, beside the same edits without it."""
    asked = {one["edit"] for one in given["edits"] if one["changes"] == part}
    value, least = (
        float(np.mean([one[column] for one in row["edits"] if one["edit"] in asked])) for row in (given, plain)
    )
    return Figure(name=name, value=value, unit="", goal=f"≥ {least:.3g}", met=value >= least)


def judge_options(judge: Judge, config: Quality) -> list[Figure]:
    """Every option beside an edit without any, a table of their own; what some of them are for, as figures."""
    run = {"command": " ".join(sys.argv), "machine": machine()}
    found = options.measured(judge, config.folder, config.options_out, run, config.only)
    rows = {row["option"]: row for row in found}
    if not {"--keep background", "--keep motion"} <= rows.keys():
        return []
    plain, background, motion = (rows[name] for name in ("none", "--keep background", "--keep motion"))
    return [
        _no_less("--keep background: dB outside the subject", "subject", "PSNR outside", background, plain),
        _no_less("--keep background: right frames", "subject", "right frames", background, plain),
        _no_less("--keep motion: track", "style", "track", motion, plain),
    ]


if __name__ == "__main__":
    sys.exit(command.run("quality", lambda arguments: main(tyro.cli(Quality, args=arguments))))
