"""Sheets: clips beside one another and frames spread over a page, with their captions."""

from __future__ import annotations

import numpy as np
import pytest

from tav_opt.config import InputError
from tav_opt.video.contact_sheet import contact_sheet, side_by_side


def noise(frames: int, side: int = 64) -> np.ndarray:
    """A clip of random squares."""
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)


def test_side_by_side_holds_the_clips_and_their_captions() -> None:
    clips = [noise(4, 256), noise(4, 256)[:, ::-1, ::-1]]
    pages = side_by_side(clips, ["source", "an edit"])
    assert pages.dtype == np.uint8 and len(pages) == 4 and not any(side % 2 for side in pages.shape[1:3])
    top = pages.shape[1] - 12 - 256
    for clip, left in zip(clips, (12, 280), strict=True):
        assert np.array_equal(pages[:, top : top + 256, left : left + 256], clip)
        assert (pages[:, :top, left : left + 256] < 128).any(), "a caption is drawn"
    empty = side_by_side(clips, ["", "an edit"])
    assert (empty[:, :top, :270] == 255).all(), "the test above can fail"


def test_long_captions_wrap_and_end_in_the_panel() -> None:
    clips = [noise(1, 256)] * 2
    one, three = side_by_side(clips, ["a", "b"]), side_by_side(clips, ["word " * 200, "W" * 300])
    assert three.shape[1] > one.shape[1] and three.shape[2] == one.shape[2]
    assert three.shape[1] < 400
    top = three.shape[1] - 256 - 14
    assert (three[0, :top, 268:280] == 255).all(), "nothing written in the margin between"


def test_small_clips_are_enlarged_for_their_captions() -> None:
    assert side_by_side([noise(2)], ["tiny"]).shape[1:] == (12 + 26 + 256 + 12, 256 + 24, 3)


def test_contact_sheet_spreads_frames_over_each_clip() -> None:
    greys = np.arange(0, 250, 10, dtype=np.uint8)  # 25 frames, each one grey
    clip = np.broadcast_to(greys[:, None, None, None], (25, 96, 192, 3))
    sheet = contact_sheet([clip, clip[::-1]], ["up", "down"], columns=5)
    first = [12 + 96 + column * 204 for column in range(5)]
    values = [sheet[y, first, 0].tolist() for y in range(len(sheet))]
    assert [0, 60, 120, 180, 240] in values and [240, 180, 120, 60, 0] in values
    assert sheet.shape[1] == 12 + 5 * 204
    assert contact_sheet([clip[:2]], ["two"]).shape[1] == 12 + 2 * 204


@pytest.mark.parametrize("draw", [side_by_side, contact_sheet])
def test_sheets_refuse(draw) -> None:
    for clips, captions in (([], []), ([noise(1)], []), ([noise(1)[0]], ["a"]), ([noise(1).astype(int)], ["a"])):
        with pytest.raises(InputError):
            draw(clips, captions)
    with pytest.raises(InputError, match="one shape"):
        side_by_side([noise(1), noise(2)], ["a", "b"])
