"""The image baselines of suites against independent truths: diffusers' own UNet, and the formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tav_opt import ddim, models
from tav_opt.suite import image_baselines
from tav_opt.suite.image_baselines import PlugAndPlay, invert_frames, predict_frames


@pytest.fixture(scope="module")
def image(golden: Path) -> models.StableDiffusion:
    return models.load_image(golden / "reference_checkpoint" / "sd")


LATENTS = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_frame_is_predicted_by_itself_as_diffusers_does(image: Any) -> None:
    text = torch.randn(1, 77, 32)
    together = predict_frames(image, LATENTS, 500, text)
    for index in range(3):
        alone = image.unet(LATENTS[:, :, index], 500, text).sample
        torch.testing.assert_close(together[:, :, index], alone, atol=1e-5, rtol=1e-5)


def test_every_frame_is_inverted_by_itself(image: Any) -> None:
    empty = models.encode_prompt(image, "")
    passed = invert_frames(image, LATENTS, empty, 4, lambda _: None)
    assert passed.shape == (4, 4, 3, 8, 8)
    alone = ddim.invert(lambda *g: predict_frames(image, *g), LATENTS[:, :, 1:2], empty, image.schedule, 4)
    torch.testing.assert_close(passed[-1:, :, 1:2], alone, atol=1e-4, rtol=1e-4)


def _features(image: Any, call: Any) -> torch.Tensor:
    """What is injected, before the shortcut is added: the last that the convolution gives out, whoever changed it."""
    found: list[torch.Tensor] = []
    hook = image.unet.up_blocks[1].resnets[1].conv2.register_forward_hook(lambda _m, _g, made: found.append(made))
    try:
        call()
    finally:
        hook.remove()
    return found[0]


def test_plug_and_play_injects_the_sources_features_and_attention(image: Any) -> None:
    """Against plain calls of diffusers' own UNet on the source."""
    empty, text = models.encode_prompt(image, ""), models.encode_prompt(image, ["", "a cat"])
    passed = invert_frames(image, LATENTS, empty, 5, lambda _: None)
    timestep = image.schedule.timesteps(5)[0]
    latents = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    plain = predict_frames(image, latents, timestep, text)
    source = _features(image, lambda: predict_frames(image, passed[-1:], timestep, empty))
    with PlugAndPlay(image, passed, empty, 5).installed() as predict:
        injected = _features(image, lambda: predict(latents, timestep, text))
        for _ in range(3):  # in four of five steps features are injected
            predict(latents, timestep, text)
        last = predict(latents, timestep, text)
    for row in range(3):  # the source's own, and both that are sampled: (rows f) c h w
        torch.testing.assert_close(injected[3 * row : 3 * row + 3], source, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predict_frames(image, latents, timestep, text), plain, msg="the UNet is as it was")


def test_plug_and_play_of_the_sources_own_latents_is_the_source(image: Any) -> None:
    """Where everything is injected, and text and latents are the source's, nothing changes."""
    empty = models.encode_prompt(image, "")
    passed = invert_frames(image, LATENTS, empty, 4, lambda _: None)
    timestep = image.schedule.timesteps(4)[0]
    plain = predict_frames(image, passed[-1:], timestep, empty)
    with PlugAndPlay(image, passed, empty, 4).installed() as predict:
        made = predict(passed[-1:].repeat(2, 1, 1, 1, 1), timestep, empty.repeat(2, 1, 1))
    torch.testing.assert_close(made, plain.repeat(2, 1, 1, 1, 1), atol=1e-5, rtol=1e-4)


def test_plug_and_play_leaves_the_shortcut_to_every_row(image: Any) -> None:
    """The block's own input reaches its output: injected is what the convolution makes alone."""
    empty, text = models.encode_prompt(image, ""), models.encode_prompt(image, ["a cat"])
    passed = invert_frames(image, LATENTS, empty, 5, lambda _: None)
    block = image.unet.up_blocks[1].resnets[1]
    given: list[Any] = []
    hook = block.register_forward_hook(lambda _module, taken, made: given.append((taken[0], made)))
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with PlugAndPlay(image, passed, empty, 5).installed() as predict:
        convolved = _features(image, lambda: predict(latents, image.schedule.timesteps(5)[0], text))
    hook.remove()
    ((taken, made),) = given
    shortcut = taken if block.conv_shortcut is None else block.conv_shortcut(taken)
    torch.testing.assert_close(made, (shortcut + convolved) / block.output_scale_factor)
    assert (made[:3] - made[3:]).abs().max() > 1e-3, "the rows are not the source's copies"


class _Looking:
    """A processor that keeps what an attention was given and made."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.kept = inner, list[tuple[torch.Tensor, torch.Tensor]]()

    def __call__(self, attention: Any, hidden: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        made = self.inner(attention, hidden, *rest, **more)
        self.kept.append((hidden, made))
        return made


def _attended(attention: Any, source: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """softmax(q_source k_sourceᵀ / √d) · v_own, written out."""
    q, k, v = attention.to_q(source), attention.to_k(source), attention.to_v(own)
    q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def test_half_of_the_steps_inject_the_sources_queries_and_keys(image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without features, of five steps the first three: Tumanyan et al. count up to half of the steps, rounded up."""
    monkeypatch.setattr(image_baselines, "FEATURES", 0)
    empty, text = models.encode_prompt(image, ""), models.encode_prompt(image, ["a cat"])
    passed = invert_frames(image, LATENTS, empty, 5, lambda _: None)
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    blocks = [module for block in image.unet.up_blocks for name, module in block.named_modules() if "attn1" in name]
    attention = [module for module in blocks if hasattr(module, "to_q")][-1]
    with PlugAndPlay(image, passed, empty, 5).installed() as predict:
        looking = _Looking(attention.processor)
        attention.set_processor(looking)
        for timestep in image.schedule.timesteps(5):
            predict(latents, timestep, text)
        attention.set_processor(looking.inner)
    assert len(looking.kept) == 5 and image_baselines.ATTENTION == 0.5
    for step, (hidden, made) in enumerate(looking.kept):
        source, own = hidden[:3], hidden[3:]
        expected = _attended(attention, source if step < 3 else own, own)  # ceil(0.5 · 5) steps
        torch.testing.assert_close(made[3:], expected, atol=1e-5, rtol=1e-4)
        other = _attended(attention, own if step < 3 else source, own)
        assert (made[3:] - other).abs().max() > 1e-4, "the two would not be told apart"
