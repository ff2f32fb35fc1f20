"""What `--keep` keeps of the package's clips, and what it costs: `python benchmarks/keeping.py --help`.

Edits of subjects with and without `--keep background`, and of styles with and without `--keep motion`: those of
quality.py and the held-out ones of frontier.py, judged as there. Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from common import Figure, header, machine
from crossings import DEMO, EDITS, Source, background_psnr, exported, scores, sources
from frontier import HELD_OUT
from PIL import Image

from tav_opt import command, editing
from tav_opt.config import Keep
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.engines.registry import open_clip
from tav_opt.export.controlled import CONTROLLED
from tav_opt.files import read_json, write_json
from tav_opt.video import contact_sheet

PSNR, TRACK = 32.0, 0.98


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Edits the clips with and without what keeps their backgrounds and motion."""

    clips: tuple[str, ...] = tuple(EDITS)
    """The rows of others stay as they were written."""
    steps: int = 20
    """DDIM steps of sampling and of inversion."""
    keep: tuple[Keep, ...] = ("background", "motion")
    folder: Path = Path("demo-out/quality")
    """Tuned clips, and the sheets."""
    out: Path = Path("benchmarks/results/keeping.json")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt, without and with."""

    clip: str
    keep: Keep
    prompt: str
    ceiling: float
    """PSNR outside, in dB, of the source as the VAE gives it back, which no edit of its latents exceeds by much."""
    without: dict[str, float]
    kept: dict[str, float]


def main(config: Keeping) -> int:
    """Prints a row a prompt and the figures, keeps both and the sheets; returns the exit status."""
    judge, rows = Judge.open(), _others(config)
    by_name = {source.name: source for source in sources()}
    for name in config.clips:
        for row in _edited(judge, by_name[name], config):
            print(_line(row), flush=True)
            rows.append(row)
            told = {"command": " ".join(sys.argv), "machine": machine(), "rows": [vars(row) for row in rows]}
            write_json(config.out, told)
    figures = [figure for keep in config.keep for figure in _figures(keep, [row for row in rows if row.keep == keep])]
    print("\n| figure | measured | goal | met |\n|---|---:|---|---|")
    print("\n".join(map(str, figures)))
    print(header("\nwhat is kept of the package's clips"))
    return int(not all(figure.met for figure in figures))


def _others(config: Keeping) -> list[Row]:
    """Those that are not asked for now, as they were written before."""
    found = read_json(config.out)["rows"] if config.out.is_file() else []
    return [Row(**row) for row in found if row["clip"] not in config.clips or row["keep"] not in config.keep]


def _edited(judge: Judge, source: Source, config: Keeping) -> Iterator[Row]:
    exported(source, config.folder, further=[CONTROLLED])
    engine = open_clip(config.folder / "repository", source.name, threads=1)
    ceiling = background_psnr(engine.decode(engine.source_latents)[0], source)
    sheet, captions = [source.clip.frames], [source.caption]
    plain = replace(DEMO.edit_config(), steps=config.steps, inversion_steps=config.steps)
    for change in EDITS[source.name] + HELD_OUT[source.name]:
        keep: Keep | None = {("subject",): "background", ("style",): "motion"}.get(tuple(change))  # type: ignore[assignment]
        if keep not in config.keep:
            continue
        prompt, found = world.prompt(source.edited(change)), []
        for settings in (replace(plain, prompts=(prompt,)), replace(plain, prompts=(prompt,), keep=keep)):
            began = time.process_time()
            frames = editing.edit(engine, settings)[0]
            seconds = time.process_time() - began
            judged = scores(judge, frames, source, change) | {"psnr outside": background_psnr(frames, source)}
            found.append({name: float(value) for name, value in judged.items()} | {"seconds": seconds})
            sheet.append(frames)
            captions.append(f"{prompt}, keep {settings.keep}" if settings.keep else prompt)
        Image.fromarray(contact_sheet.contact_sheet(sheet, captions)).save(config.folder / f"keep-{source.name}.png")
        yield Row(clip=source.name, keep=keep, prompt=prompt, ceiling=ceiling, without=found[0], kept=found[1])


def _line(row: Row) -> str:
    both = (f"{name} {row.without[name]:.3f} → {row.kept[name]:.3f}" for name in row.kept)
    return f"{row.prompt} (keep {row.keep}; the VAE {row.ceiling:.1f} dB): " + ", ".join(both)


def _figures(keep: Keep, rows: list[Row]) -> list[Figure]:
    def mean(name: str, kept: bool) -> float:
        return float(np.mean([(row.kept if kept else row.without)[name] for row in rows]))

    def figure(name: str, kept: bool, unit: str, goal: float | None) -> Figure:
        value = mean(name, kept)
        least = "" if goal is None else f"≥ {goal:.3g}"
        which = f"{keep}, {name}, {'kept' if kept else 'without'}"
        return Figure(name=which, value=value, unit=unit, goal=least, met=goal is None or value >= goal)

    aim = {"psnr outside": PSNR} if keep == "background" else {"track": TRACK}
    found = []
    for name, unit in (("right frames", ""), ("psnr outside", "dB"), ("track", ""), ("seconds", "s")):
        goal = mean(name, False) if name == "right frames" else aim.get(name)
        found += [figure(name, False, unit, None), figure(name, True, unit, goal)]
    return found


if __name__ == "__main__":
    sys.exit(command.run("keeping", lambda arguments: main(tyro.cli(Keeping, args=arguments))))
