"""Teaching the package's model a subject that it does not know: `python benchmarks/personal.py --help`.

Four composites of an emoji that is none of the world's subjects are what `tav-opt personalise` learns from, each in a
place of its own. Judged are pictures of it in places where it was not seen, what became of the other subjects, and a
clip that is tuned on the new model and edited into it. Settings were chosen on the ogre (1f479), another emoji than the
one that is reported, but for the learning rate and the clip's tuning: with the ogre's the other subjects lost too much.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from common import Figure, header, machine
from crossings import DEMO, sources
from PIL import Image
from quality import PACKAGE, Quality, judge_images, pictures_of

from tav_opt import command, editing, tuning
from tav_opt.config import PersonaliseConfig
from tav_opt.demo import subjects, world
from tav_opt.demo.dual_encoder import phrase_of
from tav_opt.demo.judge import Judge, track_correlation
from tav_opt.demo.places import PLACES
from tav_opt.demo.training import grid
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import write_json
from tav_opt.personalise import dreambooth
from tav_opt.video import contact_sheet

WORD = "sks octopus"
"""Its class is a word that the model knows: in twelve pictures the untrained model drew all places that were asked for
beside it, and half of them beside alien."""
SEEN = ("beach", "night", "city", "desert")
"""Where the four pictures show it; the prompt names none of them, so that they are no part of the subject."""
OTHERS = tuple(place for place in PLACES if place not in SEEN)
"""Where it is drawn: the twelve pictures are of these, each once or twice."""
PICTURES = 12
PRESERVED = (
    "octopus", "robot", "tiger", "car", "penguin", "burger", "horse", "owl", "crab", "rocket", "apple", "sunflower",
    "snowman",
)  # fmt: skip
"""Of the class's prompts, two of each place: one is of the class itself, the other of a subject that it knows."""
STEPS = 20
"""Of DDIM, of each picture."""
MOST_LOST = 3.0
"""Percentage points that the other subjects may lose."""


@dataclass(frozen=True, kw_only=True)
class Personal:
    """Personalises the package's model, and judges the subject, the others, and an edit of a clip into it."""

    emoji: str = "1f47e"
    """Code point of one of the Fluent emoji that is no subject of the world; this one is the space invader."""
    train: tyro.conf.OmitArgPrefixes[PersonaliseConfig] = field(
        default_factory=lambda: PersonaliseConfig(
            steps=400,
            lr=1.2e-4,
            schedule="cosine",
            batch=2,
            class_images=96,
            draw_steps=12,
            draw_guidance=5.0,
            seed=33,
        )
    )
    clip: str | None = "chick"
    """The package's clip that is tuned on the new model and edited into it; None: no clip. This one stands upright and
    faces the viewer, as emoji that are faces or figures do."""
    tuning_steps: int = 60
    """Of the clip's tuning; the 200 of the demo leave less of the subject."""
    others: bool = True
    """Judge the other subjects too, which takes longest; False: only the new one."""
    seeds: int = 1
    """Pictures of each of the others' 200 prompts."""
    folder: Path = Path("demo-out/personal")
    out: Path | None = Path("benchmarks/results/personal.json")


def main(config: Personal) -> int:
    """Prints a table, keeps figures and sheets; returns the exit status."""
    judge, folder = Judge.open(), config.folder
    four = _composites(config.emoji, SEEN)
    _write(four, folder / "pictures")
    began = time.perf_counter()
    model = dreambooth.personalise(
        str(PACKAGE / "model"),
        folder / "pictures",
        f"a {WORD}",
        config.train,
        folder / "model",
        class_prompt=_class_prompts(),
    )
    figures = [Figure(name="personalising", value=time.perf_counter() - began, unit="s", goal="", met=True)]
    figures += _subject(judge, config, four, model)
    if config.clip is not None:
        figures += _clip(judge, config, four, model)
    if config.others:
        figures += _others(judge, config, model)
    print("\n".join(("| figure | measured | goal | met |", "|---|---:|---|---|", *map(str, figures))))
    print(header("\na subject that the package's model did not know"))
    if config.out is not None:
        rows = [vars(figure) for figure in figures]
        write_json(config.out, {"command": " ".join(sys.argv), "machine": machine(), "figures": rows})
    return int(not all(figure.met for figure in figures))


def _class_prompts() -> list[str]:
    """Two of every place of the world."""
    others = PRESERVED[1:]
    known = (f"{world.subject_phrase(others[n % len(others)])} {PLACES[place][0]}" for n, place in enumerate(PLACES))
    return [*(f"{world.subject_phrase(PRESERVED[0])} {names[0]}" for names in PLACES.values()), *known]


def _composites(emoji: str, places: tuple[str, ...]) -> np.ndarray:
    """The subject itself in these places, uint8 (places, H, W, 3)."""
    sprites, rng = subjects.stills({WORD: emoji}), np.random.default_rng(5)
    return np.stack([world.compose(world.Scene(subject=WORD, place=place), sprites, rng) for place in places])


def _write(images: np.ndarray, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")


def _prompts() -> list[str]:
    return [f"a {WORD} {PLACES[place][0]}" for place in _places()]


def _places() -> list[str]:
    return [OTHERS[number % len(OTHERS)] for number in range(PICTURES)]


def _drawn(model: Path) -> np.ndarray:
    made = pictures_of(model)(
        _prompts(),
        num_inference_steps=STEPS,
        guidance_scale=Quality.guidance,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    return np.asarray((made * 255).round().astype(np.uint8))


def _subject(judge: Judge, config: Personal, four: np.ndarray, model: Path) -> list[Figure]:
    """Its likeness to the four: of what the model draws, of what it drew before, and of the subject itself."""
    drawn, before = _drawn(model), _drawn(PACKAGE / "model")
    itself = _composites(config.emoji, OTHERS)
    page = Image.fromarray(grid(np.concatenate([_row_of(four), drawn]), PICTURES // 2))
    page.resize((page.width * 2, page.height * 2), Image.Resampling.LANCZOS).save(config.folder / "pictures.png")
    found = _likeness(judge, drawn, four)
    known = (("the model before", before), ("the subject itself in those places", itself))
    return [
        Figure(name="likeness to the four pictures", value=found, unit="", goal="≥ 0.8", met=found >= 0.8),
        *(Figure(name=f"… {name}", value=_likeness(judge, x, four), unit="", goal="", met=True) for name, x in known),
        *(
            Figure(
                name=f"pictures in the place that was asked for{of}",
                value=_placed(judge, x),
                unit="%",
                goal="",
                met=True,
            )
            for of, x in (("", drawn), (", the model before", before))
        ),
    ]


def _placed(judge: Judge, images: np.ndarray) -> float:
    """Percentage of the twelve that show the place that was asked for, of all the world's."""
    names = list(PLACES)
    shown = judge.classify(images, [phrase_of("place", name) for name in names])
    return 100 * float(np.mean([names[at] == place for at, place in zip(shown, _places(), strict=True)]))


def _row_of(four: np.ndarray) -> np.ndarray:
    """The four and white to their right: a row of the sheet."""
    white = np.full((PICTURES // 2 - len(four), *four.shape[1:]), 255, np.uint8)
    return np.concatenate([four, white])


def _likeness(judge: Judge, images: np.ndarray, four: np.ndarray) -> float:
    """The mean cosine of the dual encoder's embeddings, each picture with each of the four."""
    found, known = judge.encoder.embed_images(images), judge.encoder.embed_images(four)
    return float((found @ known.T).mean())


def _clip(judge: Judge, config: Personal, four: np.ndarray, model: Path) -> list[Figure]:
    """A clip of another subject, tuned on the new model and edited into the new subject."""
    (source,) = (source for source in sources() if source.name == config.clip)
    tuned = config.folder / "clip"
    tuning.tune(str(model), source.clip, source.caption, replace(DEMO.train, steps=config.tuning_steps), tuned)
    prompt = f"a {WORD} {PLACES[source.scene.place][0]}"
    frames = editing.edit(open_checkpoint(tuned), DEMO.edit_config(prompt))[0]
    sheet = contact_sheet.contact_sheet([source.clip.frames, frames], [source.caption, prompt])
    Image.fromarray(sheet).save(config.folder / "clip.png")
    found, track = _likeness(judge, frames, four), track_correlation(judge.track(frames), source.track)
    return [
        Figure(
            name=f"{config.clip}'s clip edited into it: likeness", value=found, unit="", goal="≥ 0.8", met=found >= 0.8
        ),
        Figure(name="… track against the source's", value=track, unit="", goal="≥ 0.9", met=track >= 0.9),
    ]


def _others(judge: Judge, config: Personal, model: Path) -> list[Figure]:
    """What quality.py finds of the others, before and after, in pictures of the same prompts from the same noise."""
    asked = Quality(seeds=config.seeds, folder=config.folder)
    before = {figure.name: figure.value for figure in judge_images(judge, replace(asked, model=PACKAGE / "model"))}
    found = []
    for figure in judge_images(judge, replace(asked, model=model)):
        least = before[figure.name] - MOST_LOST
        found.append(
            replace(
                figure,
                name=f"others, {figure.name} (before: {before[figure.name]:.1f} %)",
                goal=f"≥ {least:.1f} %",
                met=figure.value >= least,
            )
        )
    return found


if __name__ == "__main__":
    sys.exit(command.run("personal", lambda arguments: main(tyro.cli(Personal, args=arguments))))
