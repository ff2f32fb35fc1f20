"""Attention control against probabilities that are written out and changed as Prompt-to-Prompt changes them."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_unet import TINY
from torch import Tensor

from tav_opt.conditions.attention_control import CONTROL
from tav_opt.config import InputError
from tav_opt.unet import VideoUNet, inflate

B, F, SIDE, TOKENS, HEADS = 3, 3, 8, 6, 2
SOURCE, FREE, EDIT = range(B)


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    """In float64, its parts that begin at zero at random."""
    torch.manual_seed(0)
    found = inflate(UNet2DConditionModel(**TINY))
    for name, value in found.named_parameters():
        if "attn_temp.to_out" in name:
            torch.nn.init.normal_(value, std=0.1)
    return found.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    latents = torch.randn(B, 4, F, SIDE, SIDE, dtype=torch.float64)
    return latents, torch.tensor([9, 500, 3]), 3 * torch.randn(B, TOKENS, 12, dtype=torch.float64)


def off() -> dict[str, Tensor]:
    zeros = torch.zeros(B, dtype=torch.int64)
    none = torch.zeros(B, TOKENS, dtype=torch.float64)
    return {
        "self_source": zeros,
        "cross_source": zeros,
        "token_map": torch.zeros(B, TOKENS, TOKENS, dtype=torch.float64),
        "word_weights": torch.ones_like(none),
        "blend_words": none,
    }


def of_edit(name: str, value: Tensor | int) -> dict[str, Tensor]:
    """One of the tensors, the edit's row changed."""
    found = off()[name].clone()
    found[EDIT] = value
    return {name: found}


class Naive:
    """Attention of both kinds, its probabilities (b, heads, queries, keys) written out for a rule to change."""

    def __init__(self, rule) -> None:
        self.rule, self.seen = rule, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        if text is None:
            clips = x.unflatten(0, (-1, F))
            keys = torch.cat([clips[:, :1].expand_as(clips), clips[:, [0, *range(F - 1)]]], 2).flatten(0, 1)
            kind, queries = "self", x
        else:
            kind, queries, keys = "cross", x.unflatten(0, (-1, F)).flatten(1, 2), text
        projected = attn.to_q(queries), attn.to_k(keys), attn.to_v(keys)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected)
        maps = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        self.seen.append((kind, x.shape[1], maps))
        return attn.to_out[0]((self.rule(kind, maps) @ v).transpose(1, 2).flatten(2).reshape(x.shape))


def naive(unet: VideoUNet, inputs, rule) -> tuple[Tensor, Naive]:
    """The network's answer with probabilities changed by the rule, and what was seen on the way."""
    processor, own = Naive(rule), {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            own[module] = module.processor
            module.set_processor(processor)
    try:
        return unet(*inputs), processor
    finally:
        for module, before in own.items():
            module.set_processor(before)


def edited(change):
    """A rule for the edit's cross maps (heads, queries, tokens), given the source's."""

    def rule(kind: str, maps: Tensor) -> Tensor:
        if kind == "self":
            return maps
        return torch.stack([maps[SOURCE], maps[FREE], change(maps[SOURCE], maps[EDIT])])

    return rule


def self_replaced(kind: str, maps: Tensor) -> Tensor:
    if kind == "cross":
        return maps
    return maps.unflatten(0, (B, F))[[SOURCE, FREE, SOURCE]].flatten(0, 1)


MAPPER = torch.tensor(
    [
        [1, 0, 0, 0, 0, 0],
        [0, 0.5, 0.5, 0, 0, 0],  # one token of the source's is two of the edit's
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.float64,
)
ORDER, ALPHAS = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.float64)
REFINED = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).index_put_((ORDER, torch.arange(TOKENS)), ALPHAS)
WEIGHTS = torch.tensor([1, 2.5, 1, 0, 1, 1], dtype=torch.float64)
CASES = {
    # Prompt-to-Prompt's AttentionReplace: einsum('hpw,wn->hpn'), with the weights of own attention at zero.
    "replace": (
        of_edit("cross_source", 2) | of_edit("token_map", MAPPER) | of_edit("word_weights", 0),
        edited(lambda s, t: torch.einsum("hpw,wn->hpn", s, MAPPER)),
    ),
    # AttentionRefine: base[:, :, mapper] * alphas + own * (1 - alphas).
    "refine": (
        of_edit("cross_source", 2) | of_edit("token_map", REFINED) | of_edit("word_weights", 1 - ALPHAS),
        edited(lambda s, t: s[:, :, ORDER] * ALPHAS + t * (1 - ALPHAS)),
    ),
    # AttentionReweight after refinement, and of own attention.
    "reweight": (
        of_edit("cross_source", 2)
        | of_edit("token_map", REFINED * WEIGHTS)
        | of_edit("word_weights", (1 - ALPHAS) * WEIGHTS),
        edited(lambda s, t: (s[:, :, ORDER] * ALPHAS + t * (1 - ALPHAS)) * WEIGHTS),
    ),
    "weights alone": (of_edit("word_weights", WEIGHTS), edited(lambda s, t: t * WEIGHTS)),
    # AttentionControlEdit's replace_self_attention: the source's maps in place of the edit's.
    "self": (of_edit("self_source", 2), self_replaced),
}


@pytest.mark.parametrize("name", CASES)
def test_each_operator_is_what_changed_probabilities_give(unet, inputs, name):
    tensors, rule = CASES[name]
    found = unet(*inputs, **off() | tensors)[:, :-1]
    expected, _ = naive(unet, inputs, rule)
    assert (found - expected).abs().max() < 1e-12
    plain = unet(*inputs)
    assert torch.equal(found[:EDIT], plain[:EDIT]), "the source and the unconditional row are left alone"
    assert (found[EDIT] - plain[EDIT]).abs().max() > 1e-3


def test_all_at_once(unet, inputs):
    def rule(kind: str, maps: Tensor) -> Tensor:
        return CASES["refine"][1](kind, maps) if kind == "cross" else self_replaced(kind, maps)

    found = unet(*inputs, **off() | CASES["refine"][0] | of_edit("self_source", 2))[:, :-1]
    assert (found - naive(unet, inputs, rule)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_all_switches_off_it_is_the_plain_network_bit_for_bit(unet, inputs, dtype):
    given = [inputs[0].to(dtype), inputs[1], inputs[2].to(dtype)]
    plain = unet.to(dtype)(*given)
    found = unet(*given, **off())
    unet.double()
    assert torch.equal(found[:, :-1], plain) and not found[:, -1].any()


def test_the_map_is_the_probability_of_the_words(unet, inputs):
    """Over heads, and the layers of half and a quarter of the size; here the one in the middle, of 4 × 4."""
    words = torch.zeros(B, TOKENS, dtype=torch.float64)
    words[SOURCE, 2] = words[EDIT, [3, 4]] = 1
    found = unet(*inputs, **off() | {"blend_words": words})[:, -1]
    seen = naive(unet, inputs, lambda kind, maps: maps)[1].seen
    (maps,) = [maps for kind, n, maps in seen if kind == "cross" and n == SIDE**2 // 4]
    expected = (maps.mean(1) * words[:, None]).sum(-1).reshape(B * F, 1, SIDE // 2, SIDE // 2)
    expected = torch.nn.functional.interpolate(expected, scale_factor=2, mode="bilinear").reshape(B, F, SIDE, SIDE)
    assert (found - expected).abs().max() < 1e-12 and not found[FREE].any() and found[EDIT].std() > 0


def test_rows_of_two_edits_in_one_batch_are_those_of_each(unet, inputs):
    """What is told of a row counts from the row itself: so calls can be put together."""
    tensors = off() | CASES["refine"][0] | of_edit("self_source", 2)
    one = unet(*inputs, **tensors)
    twice = unet(*(torch.cat([x, x.flip(0)]) for x in inputs), **{n: torch.cat([t, t]) for n, t in tensors.items()})
    assert (twice[:B] - one).abs().max() < 1e-12
    flipped = unet(*(x.flip(0) for x in inputs), **tensors)
    assert (twice[B:] - flipped).abs().max() < 1e-12


def test_what_is_not_told_is_named(unet, inputs):
    for name in CONTROL:
        with pytest.raises(InputError, match=name):
            unet(*inputs, **{other: tensor for other, tensor in off().items() if other != name})
