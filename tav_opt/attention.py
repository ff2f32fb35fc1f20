"""The video transformer block: sparse-causal attention, text per clip, temporal (paper section 3.2, figure 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

if TYPE_CHECKING:
    from tav_opt.conditions.attention_control import Control


def _project_out(attn: Attention, x: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(x))


class SparseCausalProcessor:
    """`attn1`: frame i attends to frames 0 and i-1 (equation 4); x (b f) n c → (b f) n c."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *_: Any, frames: int, control: Control | None = None, **__: Any
    ) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if control is not None:
            q, k = control.within_frames(q, frames), control.within_frames(k, frames)
        return _project_out(attn, sparse_causal_attention(q, k, v, frames, attn.heads))


class PerClipTextProcessor:
    """`attn2`: text (b, tokens, width) is projected once a clip, the frames fold into the queries; x (b f) n c."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *_: Any,
        frames: int,
        control: Control | None = None,
        **__: Any,
    ) -> Tensor:
        b = encoder_hidden_states.shape[0]

        def split(y: Tensor) -> Tensor:  # … c → b heads … d
            return y.reshape(b, -1, attn.heads, y.shape[-1] // attn.heads).transpose(1, 2)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # → b … heads d
            return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2)

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        if control is None:
            out = attend(q, k, v)
        else:
            out = control.across_words(attend, q.reshape(b, -1, q.shape[-1]), k, v, frames)
        return _project_out(attn, out.reshape(hidden_states.shape))  # b (f n) heads d → (b f) n c


class TemporalProcessor:
    """`attn_temp`: every pixel attends over all frames, unmasked, without positions; x (b f) n c → (b f) n c."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, frames: int, **__: Any) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return _project_out(attn, temporal_attention(q, k, v, frames, attn.heads))


class VideoTransformerBlock(BasicTransformerBlock):
    """attn1, attn2, feed-forward as in the image model, then temporal attention last."""

    norm_temp: nn.LayerNorm
    attn_temp: Attention

    def inflate(self) -> None:
        """Gives a block of the image model its video parts; `attn_temp` starts as the identity of the residual."""
        width = self.attn1.to_q.in_features
        self.attn1.set_processor(SparseCausalProcessor())
        self.attn2.set_processor(PerClipTextProcessor())
        self.norm_temp = nn.LayerNorm(width)
        self.attn_temp = Attention(width, heads=self.attn1.heads, dim_head=width // self.attn1.heads)
        self.attn_temp.set_processor(TemporalProcessor())
        nn.init.zeros_(self.attn_temp.to_out[0].weight)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: Tensor | None = None,
        *_: Any,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **__: Any,
    ) -> Tensor:
        """hidden_states (b f) n c, encoder_hidden_states (b, tokens, width): f is the ratio of their batches.

        `cross_attention_kwargs` is for the attention to frames and text: `control`, where there is one.
        """
        assert encoder_hidden_states is not None
        frames = hidden_states.shape[0] // encoder_hidden_states.shape[0]
        x = super().forward(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            cross_attention_kwargs={"frames": frames, **(cross_attention_kwargs or {})},
        )
        return x + self.attn_temp(self.norm_temp(x), frames=frames)
