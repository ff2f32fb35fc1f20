"""The demo's world: what a picture shows is what its caption says, and the same each time."""

from __future__ import annotations

import itertools
from collections import Counter
from statistics import mean

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer

from tav_opt.demo import clips, subjects, world
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.demo.judge import frame_difference, outside
from tav_opt.demo.places import PLACES, background
from tav_opt.demo.text import new_tokenizer, words

SHAPES = subjects.shapes()
NAMES = list(SHAPES)


def red_square(place: str = "white", style: str = "plain", seed: int = 0) -> np.ndarray:
    scene = world.Scene(subject="red square", place=place, style=style)
    return world.compose(scene, SHAPES, np.random.default_rng(seed))


def test_a_seed_gives_the_same_pictures_and_captions() -> None:
    def drawn(seed: int) -> tuple[list[str], np.ndarray]:
        rng = np.random.default_rng(seed)
        scenes = [world.draw_scene(rng, NAMES) for _ in range(8)]
        return [world.caption(s, rng) for s in scenes], np.stack([world.compose(s, SHAPES, rng) for s in scenes])

    (captions, pictures), (again, same), (_, others) = drawn(1), drawn(1), drawn(2)
    assert captions == again
    np.testing.assert_array_equal(pictures, same)
    assert (pictures != others).any()


def test_held_out_combinations_are_a_tenth_and_never_drawn_for_training() -> None:
    everything = [
        world.Scene(subject=s, place=p, style=y) for s, p, y in itertools.product(NAMES, PLACES, world.STYLES)
    ]
    kept = {scene for scene in everything if world.held_out(scene, NAMES)}
    assert 0.05 < len(kept) / len(everything) < 0.15
    rng = np.random.default_rng(0)
    assert not kept & {world.draw_scene(rng, NAMES) for _ in range(2000)}
    assert {world.draw_scene(rng, NAMES, kept_out=True) for _ in range(200)} <= kept


def test_every_part_is_also_trained_on() -> None:
    """Only combinations are held out: each subject, place and style is seen with something."""
    names = list(JUDGED | FURTHER)
    rng = np.random.default_rng(0)
    scenes = [world.draw_scene(rng, names) for _ in range(5000)]
    assert {s.subject for s in scenes} == set(names)
    seen = Counter(s.subject for s in scenes)
    moving, judged = set(subjects.MOVING), JUDGED.keys() - subjects.MOVING
    often, sometimes, seldom = (
        mean(seen[n] for n in group) for group in (moving, judged, set(names) - moving - judged)
    )
    assert abs(often / seldom - world.MOVING_WEIGHT) < 0.15 * world.MOVING_WEIGHT
    assert abs(sometimes / seldom - world.JUDGED_WEIGHT) < 0.15 * world.JUDGED_WEIGHT
    assert {s.place for s in scenes} == set(PLACES)
    assert {s.style for s in scenes} == set(world.STYLES)


def test_fifty_of_more_than_150_subjects_are_judged_by_distinct_names() -> None:
    assert len(JUDGED) == 50
    assert len(JUDGED | FURTHER) >= 150
    assert not JUDGED.keys() & FURTHER.keys()
    codes = [*JUDGED.values(), *FURTHER.values()]
    assert len(set(codes)) == len(codes)


def test_few_subjects_look_the_other_way() -> None:
    """A sprite that is red to the left of its blue: mirrored, red lies to the right."""
    sprite = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    sprite.paste((0, 0, 200, 255), (32, 0, 64, 64))
    scene, mirrored = world.Scene(subject="flag", place="white"), 0
    for seed in range(400):
        picture = world.compose(scene, {"flag": [sprite]}, np.random.default_rng(seed)).astype(int)
        red, blue = (picture[..., a] - picture[..., b] > 100 for a, b in ((0, 2), (2, 0)))
        mirrored += np.argwhere(red)[:, 1].mean() > np.argwhere(blue)[:, 1].mean()
    assert abs(mirrored / 400 - world.MIRROR_SHARE) < 0.05


def test_the_subject_is_where_a_picture_is_red() -> None:
    picture = red_square().astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
    low, high = world.SCALES[0] ** 2, (world.SCALES[1] * 1.02) ** 2  # rotation trims a corner, softens an edge
    assert 0.85 * low < red.mean() < high


@pytest.mark.parametrize("style", world.STYLES)
def test_a_larger_picture_shows_the_same(style: str) -> None:
    scene = world.Scene(subject="red square", place="meadow", style=style)
    small, large = (world.compose(scene, SHAPES, np.random.default_rng(3), size) for size in (64, 128))
    assert large.shape == (128, 128, 3)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 8


@pytest.mark.parametrize("style", [s for s in world.STYLES if s not in ("plain", "pixel")])
def test_styles_change_the_picture_and_keep_its_form(style: str) -> None:
    styled, plain = red_square(style=style), red_square()
    assert styled.shape == plain.shape and styled.dtype == np.uint8
    assert np.abs(styled.astype(int) - plain).mean() > 10
    if style == "grey":
        assert (styled == styled[..., :1]).all()


def test_pixel_art_has_blocks_of_two_pixels() -> None:
    picture = red_square(style="pixel")
    np.testing.assert_array_equal(picture[::2, ::2], picture[1::2, 1::2])


def test_places_differ_more_between_than_within() -> None:
    def mean(place: str, seed: int) -> np.ndarray:
        return np.asarray(background(place, np.random.default_rng(seed), 64), float).mean(1)  # rows × colours

    for place, other in itertools.combinations(PLACES, 2):
        within = np.abs(mean(place, 0) - mean(place, 1)).mean()
        assert within < np.abs(mean(place, 0) - mean(other, 0)).mean(), f"{place} and {other}"


def test_captions_say_what_is_shown_vary_and_are_sometimes_empty() -> None:
    scene = world.Scene(subject="elephant", place="snow", style="sketch")
    assert world.prompt(scene) == "an elephant in the snow, pencil sketch"
    rng = np.random.default_rng(0)
    captions = [world.caption(scene, rng) for _ in range(500)]
    assert 0.05 < captions.count("") / len(captions) < 0.15
    assert all("elephant" in text for text in captions if text)
    assert {"an elephant", "the elephant in snow, as a pencil sketch"} <= set(captions)


def test_the_words_have_the_same_numbers_each_time() -> None:
    vocabularies = [new_tokenizer([*JUDGED, *FURTHER]).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)  # weights are trained on further


def test_the_tokenizer_has_one_token_a_word_and_spells_the_rest() -> None:
    tokenizer = new_tokenizer(NAMES)
    assert isinstance(tokenizer, CLIPTokenizer)
    for word in words(NAMES):
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end
    unknown = tokenizer("an axolotl ☃").input_ids[1:-1]
    assert tokenizer.unk_token_id not in unknown
    assert tokenizer.decode(unknown).strip() == "an axolotl ☃"


@pytest.mark.parametrize("crossing", clips.CLIPS, ids=lambda c: c.name)
def test_a_clip_moves_its_subject_before_a_swaying_camera(crossing: clips.Crossing) -> None:
    frames, track = clips.animate(crossing, SHAPES["red circle"] * 3)
    assert frames.shape == (clips.FRAMES, world.SIZE, world.SIZE, 3)
    red = (frames[..., 0].astype(int) > 150) & (frames[..., 1] < 90) & (frames[..., 2] < 90)
    centres = [np.argwhere(mask)[:, 1].mean() for mask in red]
    assert np.corrcoef(centres, track[:, 0])[0, 1] > 0.95
    assert abs(centres[-1] - centres[0]) > 10
    rows = [np.argwhere(mask)[:, 0].mean() for mask in red]
    assert np.corrcoef(rows, track[:, 1])[0, 1] > 0.95
    around = frame_difference(frames, outside(track, 52, frames.shape[1:3]))
    assert 0.5 < around < frame_difference(frames)
