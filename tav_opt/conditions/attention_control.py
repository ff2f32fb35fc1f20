"""Attention control (Prompt-to-Prompt, Hertz et al. 2022, arXiv 2208.01626; FateZero, Qi et al. 2023, 2303.09535).

The source is a row of the batch beside the edit, and the edit's attention takes the probabilities that the source's has
at that very step. All that is done to probabilities is linear in them: A(Q, K, V) with the source's Q and K, and with V
mapped token to token, is what edited probabilities would give. So attention stays fused, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tav_opt.config import InputError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (b, …, c), keys and values (b, tokens, c) → (b, …, heads, c / heads)."""

CONTROL = ("self_source", "cross_source", "token_map", "word_weights", "blend_words")
"""The tensors that `predict` is told beside `text`, where attention is controlled: the fields of Control."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What each row of a batch takes from which other row; of one call of the network."""

    self_source: Tensor
    """int64 (b,): how many rows above that one stands whose queries and keys spatial attention takes; 0: its own."""
    cross_source: Tensor
    """int64 (b,): the same of attention to text, for `token_map`."""
    token_map: Tensor
    """(b, tokens, tokens): how much of the source's probability of a token goes to one of the row's own tokens."""
    word_weights: Tensor
    """(b, tokens): what the row's own probabilities are multiplied by, beside those of the source."""
    blend_words: Tensor
    """(b, tokens): the tokens whose probabilities make the map of where they look."""
    size: tuple[int, int]
    """Height and width of the latents."""
    maps: list[Tensor] = field(default_factory=list)
    """(b, f, h', w') of each layer that was asked, filled in on the way."""

    @classmethod
    def of(cls, told: Mapping[str, Tensor], dtype: torch.dtype, size: tuple[int, int]) -> Control:
        """Of the tensors of CONTROL, numbers in the network's dtype; raises InputError for others."""
        if wrong := sorted(set(CONTROL) ^ set(told)):
            raise InputError(f"attention control is told {', '.join(told)}: {wrong[0]} is missing, or is none of it")
        return cls(
            self_source=told["self_source"],
            cross_source=told["cross_source"],
            token_map=told["token_map"].to(dtype),
            word_weights=told["word_weights"].to(dtype),
            blend_words=told["blend_words"].to(dtype),
            size=size,
        )

    def within_frames(self, x: Tensor, frames: int) -> Tensor:
        """Queries or keys (b f) n c of spatial attention → those that each row takes."""
        return _rows_above(x.unflatten(0, (-1, frames)), self.self_source).flatten(0, 1)

    def across_words(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """Attention of q (b, f n, c) to text k, v (b, tokens, c): what the source's probabilities give by the token
        map, and the row's own by the weights of its words."""
        self._look(attend, q, k, frames)
        taken = attend(_rows_above(q, self.cross_source), _rows_above(k, self.cross_source), self.token_map @ v)
        return attend(q, k, self.word_weights[..., None] * v) + taken

    def _look(self, attend: Attend, q: Tensor, k: Tensor, frames: int) -> None:
        """Keeps the map of the blend words, where this layer is one of those of a half or a quarter of the size."""
        sizes = [(-(-self.size[0] // part), -(-self.size[1] // part)) for part in (2, 4)]
        n = q.shape[1] // frames
        if found := [size for size in sizes if size[0] * size[1] == n]:
            # Values that are 1 at the words give the sum of their probabilities: as wide as others, for fused kernels.
            looks = attend(q, k, self.blend_words[..., None].expand_as(k))[..., 0].mean(-1)  # b (f n)
            self.maps.append(looks.unflatten(1, (frames, *found[0])))

    def where_words_look(self) -> Tensor:
        """The mean of the maps at the latents' size (b, 1, f, h, w); raises InputError for a network that has none."""
        if not self.maps:
            raise InputError("this UNet has no attention to text at a half or a quarter of the latents' size")
        resized = [F.interpolate(found, size=self.size, mode="bilinear", align_corners=False) for found in self.maps]
        return torch.stack(resized).mean(0)[:, None]


def _rows_above(x: Tensor, above: Tensor) -> Tensor:
    """Each row (b, …), or the one that stands so many above it, at most the first."""
    rows = torch.arange(x.shape[0], device=x.device) - above
    return x.index_select(0, rows.clamp(min=0))
