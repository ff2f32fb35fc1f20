"""Presets and the cheaper steps that they are made of: who decides what, from every door to the loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported import Exported, export_once
from fakes import FakeEngine, answered, editor

import tav_opt
from tav_opt import cli, client, video
from tav_opt.cli.common import given_settings
from tav_opt.cli.request import Request
from tav_opt.client.exchange import Exchange, Retry
from tav_opt.config import FILLED_IN, PRESETS, EditConfig, InputError
from tav_opt.contract import from_tensors, to_tensors

CHEAP = [name for name, settings in PRESETS.items() if settings]
PROMPT = EditConfig(prompts="a panda")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


def test_presets_are_made_of_settings_that_may_be_left_out():
    assert list(PRESETS) == ["exact", "fast", "draft"] and not PRESETS["exact"]
    for name in CHEAP:
        assert set(PRESETS[name]) <= set(FILLED_IN)
        assert EditConfig.of_preset(name, prompts="x").steps == PRESETS[name]["steps"] < EditConfig.steps
    assert EditConfig.of_preset("fast", steps=7).steps == 7
    assert EditConfig.of_preset("exact", prompts="x") == EditConfig(prompts="x")


@pytest.mark.parametrize("name", CHEAP)
def test_a_preset_goes_before_the_clips_settings_and_after_what_is_given(name):
    info = replace(FakeEngine.info, edit={"steps": 3, "guidance_scale": 2.5})
    found = info.edited(PROMPT, (), name)
    assert (found.steps, found.guidance_scale) == (PRESETS[name]["steps"], 2.5)
    assert info.edited(replace(PROMPT, steps=9), ("steps",), name).steps == 9
    assert info.edited(PROMPT).steps == 3


@pytest.mark.parametrize("name", CHEAP)
def test_a_served_request_of_a_preset_is_that_of_its_settings(name):
    calls = {}
    for kind, tensors in {
        "preset": to_tensors("toy", PROMPT, preset=name, left_out=FILLED_IN),
        "settings": to_tensors("toy", EditConfig.of_preset(name, prompts=PROMPT.prompts)),
    }.items():
        engine = FakeEngine()
        responses, report = answered(editor(engine), tensors)
        calls[kind] = (
            engine.batches,
            json.loads(responses[-1]["metadata"][0]),
            report.line(prompts=False).split("text=")[0],
        )
    assert calls["preset"][:2] == calls["settings"][:2]
    batches, about, line = calls["preset"]
    assert len(batches) == about["steps"] == PRESETS[name]["steps"]
    assert batches.count(1) > 0.3 * len(batches), "the half without the prompt is left out now and then"
    assert (about["solver"], about["guidance_interval"]) == (
        PRESETS[name].get("solver", "ddim"),
        PRESETS[name]["guidance_interval"],
    )
    assert f"solver={about['solver']} guidance_interval={about['guidance_interval']}" in line


def test_servers_of_before_are_asked_for_nothing_that_they_do_not_know():
    usual = to_tensors("toy", PROMPT)
    assert {"preset", "solver", "guidance_interval", "reuse_interval"}.isdisjoint(usual)
    assert from_tensors(to_tensors("toy", replace(PROMPT, solver="unipc"))).edit.solver == "unipc"


def test_what_a_request_says_goes_before_its_preset():
    request = from_tensors(
        to_tensors("toy", replace(PROMPT, steps=4), preset="fast", left_out=set(FILLED_IN) - {"steps"})
    )
    assert (request.preset, request.given) == ("fast", {"steps", "negative_prompt", "eta", "seed"})
    assert FakeEngine.info.edited(request.edit, request.given, request.preset).steps == 4


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"preset": np.array([b"quick"], object)}, "preset 'quick' is not exact, fast, draft"),
        ({"solver": np.array([b"euler"], object)}, "solver 'euler' is not ddim, dpm"),
        ({"guidance_interval": np.array([0], np.int32)}, "guidance interval 0 is not within 1…1000"),
        ({"solver": np.array([b"unipc"], object), "eta": np.array([0.5], np.float32)}, "eta 0.5 with solver unipc"),
        ({n: v for n, v in to_tensors("x", EditConfig.of_preset("fast", prompts="x")).items() if n in FILLED_IN}
         | {"preset": np.array([b"fast"], object)}, "preset fast would change nothing: steps, guidance interval"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_the_server(tensors, words):
    whole = to_tensors("toy", PROMPT, left_out=FILLED_IN)
    with pytest.raises(InputError, match=words):
        answered(editor(FakeEngine()), whole | tensors)


def test_a_client_sends_a_preset_and_refuses_one_that_would_be_ignored():
    def sent(edit: object, **options: object) -> set[str]:
        request, _ = Exchange.of("toy", edit, {"preset": "fast", **options}, Retry()).request()
        return {tensor.name for tensor in request.inputs}

    assert "preset" in sent("a panda") and not sent("a panda") & set(FILLED_IN)
    with pytest.raises(InputError, match=r"would change nothing.*EditConfig\.of_preset"):
        sent(PROMPT)
    with pytest.raises(InputError, match="preset 'quick' is not"):
        Exchange.of("toy", "a panda", {"preset": "quick"}, Retry())


@pytest.mark.parametrize(
    "arguments, given",
    [
        (("--solver", "ddim"), {"solver"}),
        (("--solver", "unipc", "--guidance-interval", "1"), {"solver", "guidance_interval"}),
        (("--reuse-interval", "1"), {"reuse_interval"}),
        (("--preset", "fast"), set()),
    ],
)
def test_the_command_line_knows_what_was_given(arguments, given):
    args, found = given_settings(Request, "x", ["--clip", "c", "--prompt", "a", *arguments])
    assert found == given and args.preset == ("fast" if "--preset" in arguments else "exact")


def test_the_request_command_leaves_to_the_server_what_was_not_given(monkeypatch, tmp_path):
    seen = {}

    def edited(_self: object, _clip: str, edit: EditConfig, **options: object) -> client.Edit:
        seen.update(options, tensors=to_tensors("c", edit, preset=options["preset"], left_out=options["left_out"]))
        return client.Edit(frames=np.zeros((1, 2, 8, 8, 3), np.uint8), fps=8)

    monkeypatch.setattr(client.Client, "edit", edited)
    command = [
        "request",
        "--clip",
        "c",
        "--prompt",
        "a",
        "--preset",
        "draft",
        "--steps",
        "50",
        "--out",
        str(tmp_path / "e"),
    ]
    assert cli.main(command) == 0
    assert seen["tensors"]["steps"] == 50 and seen["tensors"]["preset"] == [b"draft"]
    assert not {"solver", "guidance_interval", "guidance_scale"} & set(seen["tensors"])


@pytest.mark.parametrize("name", CHEAP)
def test_the_edit_command_follows_it_says_so_and_writes_it_down(name, exported, tmp_path, capsys):
    clip = exported.version / "clips" / "first"
    command = ["edit", str(clip), "--prompt", "a panda", "--preset", name]
    assert cli.main([*command, "--out", str(tmp_path / "preset")]) == 0
    said = capsys.readouterr().err
    assert f"tav-opt edit: steps {PRESETS[name]['steps']}, " in said and f"as the preset {name} brings it" in said
    engine = tav_opt.load(clip)
    frames = tav_opt.edit(engine, engine.info.edited(PROMPT, (), name))[0]
    assert np.array_equal(video.read(tmp_path / "preset").frames, frames)
    exact = tav_opt.edit(engine, replace(PROMPT, steps=PRESETS[name]["steps"]))[0]
    assert not np.array_equal(exact, frames)
    assert cli.main([*command, "--steps", "2", "--out", str(tmp_path / "few")]) == 0
    assert "steps" not in capsys.readouterr().err.split("as the preset")[0]


def test_a_preset_that_would_be_ignored_is_refused_before_anything_is_loaded(tmp_path, capsys):
    command = ["edit", str(tmp_path), "--prompt", "x", "--preset", "fast", "--steps", "3", "--guidance-interval", "2"]
    assert cli.main(command) == 2
    assert "preset fast would change nothing" in capsys.readouterr().err
