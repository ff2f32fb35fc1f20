"""Edits with their source beside them: what is asked of the network at each step, and what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import tuned
from torch import Tensor

from tav_opt import checkpoint, cli, ddim, editing, inversion
from tav_opt.conditions.attention_control import CONTROL
from tav_opt.conditions.source_row import Beside, BlendBy, Kept, Sampled, Words, where_to_change
from tav_opt.config import EditConfig, InputError, InversionConfig
from tav_opt.ddim import Known
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.memory import eager

STEPS, TOKENS = 4, 5
SCHEDULE = ddim.Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
START = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TRAJECTORY = torch.randn(STEPS + 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
TEXT, EMPTY = torch.ones(1, TOKENS, 2), torch.zeros(1, TOKENS, 2)
WORDS = Words(
    source_text=torch.full((1, TOKENS, 2), 7.0),
    token_map=torch.diag(torch.tensor([1.0, 1, 0, 1, 1])),
    weights=torch.tensor([1.0, 2, 3, 1, 1]),
    source_blend=torch.tensor([0.0, 1, 0, 0, 0]),
    edit_blend=torch.tensor([0.0, 0, 1, 0, 0]),
)
SHARES = {"replace_cross": 0.5, "replace_self": 0.25}


class Asked:
    """A network that answers with something of each row, and a map that looks left in the source and right in the
    edit; it keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, object]] = []

    def __call__(self, latents: Tensor, _timestep: object, text: object) -> Tensor:
        self.calls.append((latents, text))
        noise = latents * 0.5 + 0.1
        if isinstance(text, Tensor):
            return noise
        looks = torch.zeros_like(latents[:, :1])
        looks[0, ..., 0] = looks[-1, ..., -1] = 1
        return torch.cat([noise, looks], 1)


def sampled(asked: Asked, source: Kept | Sampled, *, blend: BlendBy | None, **shares: float) -> Tensor:
    beside = Beside(asked, source, WORDS, SCHEDULE, STEPS, blend=blend, **{**SHARES, **shares})
    step = beside.solver(None) if blend else None
    return ddim.sample(
        beside, START, TEXT, SCHEDULE, STEPS, unconditional=EMPTY, guidance_scale=3.0, solver=step
    )  # fmt: skip


def test_the_source_stands_above_the_edit_on_its_trajectory_while_it_is_looked_at():
    asked = Asked()
    sampled(asked, Kept(TRAJECTORY), blend=None)
    rows = [len(latents) for latents, _ in asked.calls]
    assert rows == [3, 3, 2, 2], "half of the steps; then the edit goes on as if there were no control"
    for number, (latents, told) in enumerate(asked.calls[:2]):
        assert torch.equal(latents[:1], TRAJECTORY[STEPS - number, None]) and torch.equal(latents[1], latents[2])
        assert told["text"][:, 0, 0].tolist() == [7, 0, 1]
        assert told["cross_source"].tolist() == [0, 0, 2]
        assert told["self_source"].tolist() == [0, 0, 2 if number < 1 else 0]
        assert torch.equal(told["token_map"][2], torch.diag(torch.tensor([1.0, 2, 0, 1, 1])))
        assert told["word_weights"].tolist() == [[1] * 5, [1] * 5, [0, 0, 3, 0, 0]]
        assert not told["token_map"][:2].any()
    assert asked.calls[2][1]["word_weights"].tolist() == [[1] * 5, WORDS.weights.tolist()]
    assert not asked.calls[2][1]["cross_source"].any() and not asked.calls[2][1]["token_map"].any()


def test_a_source_without_direct_inversion_goes_its_own_way():
    asked = Asked()
    sampled(asked, Sampled(START, SCHEDULE, STEPS), blend="words")
    alone = list[Tensor]()
    ddim.sample(Asked(), START, TEXT, SCHEDULE, STEPS, on_step=lambda step: alone.append(step.latents))
    for (latents, _), expected in zip(asked.calls, [START, *alone[:-1]], strict=True):
        assert torch.equal(latents[:1], expected)


def test_where_neither_word_looks_the_source_stands_bit_for_bit():
    found = sampled(Asked(), Kept(TRAJECTORY), blend="words")
    plain = sampled(Asked(), Kept(TRAJECTORY), blend=None)
    # One column looks, and its neighbour by the pooling, on either side of four.
    assert where_to_change(torch.eye(4)[[0]].reshape(1, 1, 1, 1, 4).expand(1, 1, 3, 4, 4))[0, 0, 0, 0].tolist() == [
        True, True, False, False,
    ]  # fmt: skip
    assert torch.equal(found, plain), "both halves look: all may change"
    kept = sampled_with_one_word(Kept(TRAJECTORY))
    assert torch.equal(kept[..., :2], TRAJECTORY[0, None][..., :2]) and not torch.equal(
        kept[..., 2:], TRAJECTORY[:1, ..., 2:]
    )


def sampled_with_one_word(source: Kept) -> Tensor:
    class Right(Asked):
        def __call__(self, latents, timestep, text):
            answer = super().__call__(latents, timestep, text)
            answer[0, -1] = 0
            return answer

    return sampled(Right(), source, blend="words")


def test_without_words_the_source_stands_where_the_predictions_agree():
    """The network answers the edit's row in the right half otherwise than the source's, whose latents are the same."""

    class Differs(Asked):
        def __call__(self, latents, timestep, text):
            answer = super().__call__(latents, timestep, text)
            answer[-1, :-1, ..., 2:] += 1
            return answer

    same = Kept(START.expand(STEPS + 1, -1, -1, -1, -1))
    found = sampled(Differs(), same, blend="changes")
    assert torch.equal(found[..., :1], START[..., :1]), "the column beside the changes may change too, by the pooling"
    assert (found - START)[..., 2:].abs().mean() > 0.05


def test_a_mask_is_smooth_over_frames_and_of_the_clips_own_most():
    looks = torch.zeros(1, 1, 5, 7, 7)
    looks[0, 0, 2, 3, 3] = 1e-3
    found = where_to_change(looks)
    assert [bool(frame.any()) for frame in found[0, 0]] == [False, True, True, True, False]
    assert found[0, 0, 2].sum() == 9
    assert not where_to_change(torch.zeros(2, 1, 3, 4, 4)).any(), "a word that looks nowhere changes nothing"


def test_guidance_kept_over_steps_asks_for_the_edit_alone():
    asked = Asked()
    beside = Beside(asked, Kept(TRAJECTORY), WORDS, SCHEDULE, STEPS, blend="words", **SHARES)
    ddim.sample(
        beside, START, TEXT, SCHEDULE, STEPS, unconditional=EMPTY, guidance_scale=3.0, guidance_interval=2
    )  # fmt: skip
    assert [told["cross_source"].tolist() for _, told in asked.calls] == [[0, 0, 2], [0, 1], [0, 0, 0], [0, 0]]


@pytest.fixture(scope="module")
def engine(golden, tmp_path_factory):
    return open_checkpoint(written(golden, tmp_path_factory.mktemp("controlled") / "ckpt"))


def written(golden: Path, folder: Path) -> Path:
    """The checkpoint of a clip of noise whose caption is `a panda is skiing`."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    checkpoint.save(tuned(golden / "reference_checkpoint" / "sd", frames, seed=1), folder, settings={})
    return folder


def config(**settings: object) -> EditConfig:
    return EditConfig(**{"prompts": ("a dog is skiing",), "steps": 3, "guidance_scale": 3.0, **settings})


def test_a_trajectory_is_that_of_the_inversion(engine):
    found = editing.start_latents(engine, config(keep="motion"))
    steps = list[Tensor]()
    inversion.invert(
        engine.predict, engine.source_latents, engine.encode_text([""]), engine.schedule, InversionConfig(steps=3),
        on_step=lambda step: steps.append(step.latents),
    )  # fmt: skip
    assert torch.equal(found, torch.cat([engine.source_latents, *steps]))


def test_shares_of_nothing_are_the_plain_edit(engine):
    plain = editing.edit(engine, config())
    weighted = editing.edit(engine, config(word_weights=("dog:1",)))
    assert np.array_equal(plain, weighted)
    off = config(keep="motion", replace_self=0.0, replace_cross=0.0)
    assert off.filled().direct_inversion and not off.controlled


def test_the_sources_own_prompt_gives_the_source_back_whatever_the_guidance(engine):
    """Direct inversion's reconstruction: bit for bit what the VAE makes of the source."""
    same = config(prompts=(engine.info.prompt,), guidance_scale=7.5)
    kept, expected = replace(same, keep="background"), engine.decode(engine.source_latents)
    assert np.array_equal(editing.edit(engine, kept), expected)
    for other in (same, replace(kept, word_weights=("panda:2",)), replace(kept, source_prompt="a dog is skiing")):
        assert not np.array_equal(editing.edit(engine, other), expected)


@pytest.mark.parametrize("settings", [{"keep": "motion"}, {"replace_self": 0.7}, {"word_weights": ("dog:9",)}])
def test_each_setting_changes_the_edit(engine, settings):
    plain = editing.edit(engine, config())
    assert not np.array_equal(editing.edit(engine, config(**settings)), plain)


def test_the_background_is_the_sources_and_several_prompts_are_each_alone(engine, monkeypatch):
    """Random networks change all of a picture: so the mask is put where it can be told."""
    from tav_opt.conditions import source_row

    def right(looks: Tensor) -> Tensor:
        mask = torch.zeros_like(looks[:1], dtype=torch.bool)
        mask[..., mask.shape[-1] // 2 :] = True
        return mask

    monkeypatch.setattr(source_row, "where_to_change", right)
    one = config(keep="background")
    both = replace(one, prompts=(*one.prompts, one.prompts[0].replace("dog", "cat")))
    text, start = editing.encode_prompts(engine, both), editing.start_latents(engine, both)
    found = list(editing.sample(engine, both, text, start, at_once=2))
    half = start.shape[-1] // 2
    for latents in found:
        assert torch.equal(latents[..., :half], engine.source_latents[..., :half])
        assert not torch.equal(latents[..., half:], engine.source_latents[..., half:])
    text = editing.encode_prompts(engine, one)
    torch.testing.assert_close(found[0], next(editing.sample(engine, one, text, start)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "sound"}, "keep 'sound' is not background or motion"),
        ({"replace_self": 1.5}, "replace self 1.5"),
        ({"direct_inversion": True}, "direct inversion would change nothing"),
        ({"source_prompt": "a cat"}, "source prompt would change nothing"),
        ({"source_prompt": " ", "keep": "motion"}, "source prompt '' is empty"),
        ({"keep": "motion", "inversion": False}, "without inversion"),
        (
            {"keep": "motion", "inversion_steps": 9},
            "inversion steps 9 with direct inversion: must be as many as steps, 3",
        ),
        ({"keep": "background", "eta": 0.5}, "eta 0.5 with blend words"),
        ({"word_weights": ("dog",)}, "WORD:WEIGHT"),
        ({"word_weights": ("lion:2",)}, "weighted word 'lion' is no word of the prompts"),
        ({"blend_words": ("lion",)}, "blend word 'lion' is no word of the prompts"),
        ({"blend_words": ("dog",), "prompts": ("a dog and a dog",)}, "say which, dog#1, dog#2"),
    ],
)
def test_what_makes_no_sense_is_named(engine, settings, words):
    with pytest.raises(InputError, match=words):
        editing.edit(engine, config(**settings))


def test_the_sources_row_is_counted_in_memory(engine, monkeypatch):
    """Of so many frames that the UNet, and not the VAE, is what takes the most."""
    long = replace(engine, info=replace(engine.info, frames=1000))
    free = eager.working_bytes(engine.sd, 1000, engine.info.height, engine.info.width, rows=2)
    monkeypatch.setattr(eager, "free_bytes", lambda _: free)
    long.check_told(("text",))
    with pytest.raises(InputError, match="editing 1000 frames"):
        long.check_told(("text", *CONTROL))


def test_the_command_keeps_the_background(golden, tmp_path, capsys):
    folder = written(golden, tmp_path / "ckpt")
    arguments = ["edit", str(folder), "--prompt", "a dog is skiing", "--steps", "2", "--keep", "background"]
    assert cli.main([*arguments, "--out", str(tmp_path / "kept.gif")]) == 0
    assert (tmp_path / "kept.gif").is_file()
    capsys.readouterr()
    arguments[3] = "a dog and a dog"
    assert cli.main([*arguments, "--blend-words", "dog", "--out", str(tmp_path / "no.gif")]) == 2
    assert "dog#1, dog#2" in capsys.readouterr().err and not (tmp_path / "no.gif").exists()


@pytest.mark.parametrize(("inversion_steps", "status"), [("12", 0), ("50", 2)])
def test_the_command_holds_settings_against_each_other_with_what_a_preset_brings(
    golden, tmp_path, capsys, inversion_steps, status
):
    arguments = ["edit", str(written(golden, tmp_path / "ckpt")), "--prompt", "a dog is skiing", "--preset", "draft"]
    arguments += ["--keep", "background", "--inversion-steps", inversion_steps, "--out", str(tmp_path / "kept.gif")]
    assert cli.main(arguments) == status
    told = "inversion steps 50 with direct inversion: must be as many as steps, 12" in capsys.readouterr().err
    assert told == (status == 2) and (tmp_path / "kept.gif").exists() == (status == 0)


def test_known_is_what_a_step_is_told():
    """The blended step hands on what it is told to the solver under it."""
    beside = Beside(Asked(), Kept(TRAJECTORY), WORDS, SCHEDULE, STEPS, blend="words", **SHARES)
    known = Known(0.5, START, START + 1, START + 2)
    assert torch.equal(beside.solver(lambda one, after: one.clean * after)(known, 0.25), (START + 1) * 0.25)
