"""The metrics that are cosines of CLIP's embeddings; all take unit vectors, as `ClipEncoder` gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from tav_opt.metrics.left_out import LeftOut


def frame_consistency(images: Tensor) -> float:
    """Mean cosine of the embeddings (f, width) over all pairs of different frames, −1…1.

    Paper section 4.2; over all pairs as TGVE 2023 has it (arXiv 2310.16003). Raises LeftOut for fewer than two frames.
    """
    if len(images) < 2:
        raise LeftOut(f"needs two frames or more, not {len(images)}")
    first, second = torch.triu_indices(len(images), len(images), 1)
    return float((images @ images.T)[first, second].mean())


def textual_alignment(images: Tensor, text: Tensor) -> float:
    """Mean of 100 × the cosine of each frame (f, width) and the edited prompt (width): CLIP score, −100…100.

    Paper section 4.2; Hessel et al. 2021 (arXiv 2104.08718), as TGVE 2023 has it (arXiv 2310.16003).
    """
    return float((images @ text).mean()) * 100


def frame_accuracy(images: Tensor, edited: Tensor, source: Tensor) -> float:
    """Part of the frames (f, width) that lie nearer to the edited prompt (width) than to the source's (width), 0…1.

    FateZero (Qi et al. 2023, arXiv 2303.09535).
    """
    return float((images @ edited > images @ source).float().mean())


def pick_score(images: Tensor, text: Tensor, scale: float) -> float:
    """Mean of scale × the cosine of each frame (f, width) and the edited prompt (width), by PickScore's own weights.

    Kirstain et al. 2023 (arXiv 2305.01569); `scale` is that network's own, about 100.
    """
    return float((images @ text).mean()) * scale
