"""Whether an edit flows as its source does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tav_opt.metrics.left_out import LeftOut
from tav_opt.metrics.optical_flow import optical_flow, visible, warp


def warping_error(edit: np.ndarray, source: np.ndarray) -> float:
    """Mean squared difference, of 1, of each frame and the next one warped onto it by the source's flow.

    Both uint8 (f, H, W, 3). Only pixels that the source shows in both frames count (Lai et al. 2018, arXiv 1808.00449),
    a mean of pairs of frames; the flow is OpenCV's dense inverse search. Raises LeftOut for one frame,
    and where no two frames show a pixel both.
    """
    errors = []
    for number, (first, second) in enumerate(pairwise(source)):
        forward, backward = optical_flow(first, second), optical_flow(second, first)
        where = visible(forward, backward)
        if where.any():
            now, after = (edit[at].astype(np.float32) / 255 for at in (number, number + 1))
            errors.append(float(((now - warp(after, forward)) ** 2)[where].mean()))
    if not errors:
        raise LeftOut("needs two neighbouring frames of the source that show something both")
    return float(np.mean(errors))
