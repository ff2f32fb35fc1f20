"""Suites that run: baselines against independent truths, units done once, faults told, the report."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from suites import CLIPS, FRAMES, PLACE, SIDE, entry, random_video, settings, written
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from tav_opt import checkpoint, cli, ddim, models, video
from tav_opt.config import InputError
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import read_object
from tav_opt.metrics.clip_encoder import DEMO
from tav_opt.suite import captions, image_baselines, results, scheduling, workshop
from tav_opt.suite.captions import Captioner
from tav_opt.suite.image_baselines import PlugAndPlay, invert_frames, predict_frames
from tav_opt.suite.intervals import bootstrap_interval, fleiss_kappa
from tav_opt.suite.results import as_markdown, cells, rows
from tav_opt.suite.rows import Row
from tav_opt.suite.suite_file import read_suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, measured_by, units
from tav_opt.suite.waiting import Waiting

HERE = Place(**PLACE)


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["evaluate", *map(str, arguments)])
    return status, *capsys.readouterr()


def ended(error: str) -> list[str]:
    """The kinds and names of the units that a run did."""
    return [line.split("] ")[1].split(":")[0] for line in error.splitlines() if line.startswith("[")]


# Baselines.


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


# A whole run.


@pytest.fixture(scope="module")
def suite_of_four(golden: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four real clips; methods of every kind; finished videos of `ready`."""
    folder = tmp_path_factory.mktemp("suite")
    videos = []
    for name, (caption, stride) in CLIPS.items():
        edits = [{"prompt": "a red cat", "category": "style"}]
        edits += [{"prompt": "a panda", "category": "subject"}] if name == "man-skiing" else []
        clip = {"stride": stride}
        videos.append(
            {"video": str(shared / "clips" / f"{name}.mp4"), "caption": caption, "edits": edits, "clip": clip}
        )
        for edit in edits:
            (folder / "ready" / name).mkdir(parents=True, exist_ok=True)
            random_video(folder / "ready" / name / f"{edit['category']}.mp4", FRAMES)
    methods = {
        "ours": None,
        "per-frame": None,
        "plug-and-play": None,
        "each-frame-alone": {"attention": "each-frame"},
        "from-noise": {"edit": {"inversion": False}},
        "ready": {"folder": "ready"},
    }
    model = golden / "reference_checkpoint" / "sd"
    return written(folder, settings(model, videos=videos, methods=methods))


@pytest.fixture(scope="module")
def four(suite_of_four: Path) -> Path:
    """The results of the whole suite."""
    out = suite_of_four.parent / "out"
    assert cli.main(["evaluate", str(suite_of_four), "--out", str(out)]) == 0
    return out


def planned(path: Path) -> list[Unit]:
    return units(read_suite(path), HERE)


@pytest.mark.full
def test_the_four_real_clips(four: Path, suite_of_four: Path) -> None:
    found = rows(read_suite(suite_of_four), planned(suite_of_four), UnitStore(four))
    assert len(found) == 5 * 6 and {row.video for row in found} == set(CLIPS)
    for row in found:
        assert video.read(row.file).frames.shape == (FRAMES, SIDE, SIDE, 3)
        assert -1 <= row.values["frame consistency"] <= 1 and row.left_out["background PSNR"] == "no mask is given"
    by_method = {row.method: video.read(row.file).frames for row in found if row.video == "car-turn"}
    names = list(by_method)
    for first, second in itertools.pairwise(names):
        assert (by_method[first] != by_method[second]).any(), f"{first} and {second} are not two methods"


@pytest.mark.full
def test_ours_is_what_tune_and_edit_make(four: Path, suite_of_four: Path, tmp_path: Path) -> None:
    """The commands for one clip, told the same: bit for bit but for the file's compression."""
    store = UnitStore(four)
    tuned = {unit.name: unit for unit in planned(suite_of_four) if unit.kind == "tune"}
    unit = tuned["car-turn"]
    assert unit.method is not None
    engine = open_checkpoint(store.folder(unit))
    from tav_opt import editing

    config = replace(unit.method.edit, prompts=(unit.video.edits[0].prompt,))
    frames = editing.edit(engine, config)[0]
    (made,) = (four / "units" / "edit").glob("ours--car-turn--style-*")
    found = video.read(made / "edit.mp4")
    video.write(tmp_path / "own.mp4", frames, found.fps)
    assert (found.frames == video.read(tmp_path / "own.mp4").frames).all()
    assert checkpoint.load(store.folder(unit)).info.prompt == unit.video.caption


@pytest.mark.full
def test_a_second_run_does_nothing_and_another_edit_only_itself(
    four: Path, suite_of_four: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, error = evaluate(capsys, suite_of_four, "--out", four)
    assert status == 0 and not ended(error) and str(four / "report" / "index.html") in out
    suite = read_suite(suite_of_four)
    store, more = UnitStore(four), suite.videos[0]
    edits = (*more.edits, replace(more.edits[0], name="more", prompt="a bus"))
    longer = replace(suite, videos=(replace(more, edits=edits), *suite.videos[1:]), methods=suite.methods[:1])
    waiting = [unit for unit in units(longer, HERE) if not store.done(unit)]
    assert [unit.name for unit in waiting] == ["ours--car-turn--more"] * 2


@pytest.mark.full
def test_the_report_has_the_papers_table(four: Path) -> None:
    told = json.loads((four / "report" / "report.json").read_text())
    ours = [e["values"]["frame consistency"] for e in told["edits"] if e["method"] == "ours"]
    cell = told["table"]["ours"]["frame consistency"]
    assert cell["mean"] == pytest.approx(np.mean(ours)) and cell["low"] <= cell["mean"] <= cell["high"]
    assert cell["edits"] == 5 and "demo's own encoder" in told["networks"]["encoder"]
    assert told["by category"]["subject"]["ours"]["frame consistency"]["low"] is None, "one video has no interval"
    page = (four / "report" / "index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|fetch\(|@import|url\(["']?http""", page), "no network"
    assert page.count("data:video/mp4;base64,") == 5 + 30 and "not CLIP" in page
    table = (four / "report" / "report.md").read_text()
    assert "| method | edits | frame consistency | textual alignment |" in table and "| plug-and-play | 5 |" in table
    with (four / "report" / "report.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 30


@pytest.mark.full
def test_large_reports_have_their_videos_beside(
    four: Path, suite_of_four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tav_opt.suite import media, report_folder

    monkeypatch.setattr(media, "EMBEDDED_BYTES", 0)
    suite = read_suite(suite_of_four)
    found = rows(suite, planned(suite_of_four), UnitStore(four))
    for _ in range(2):  # the second takes the place of the first
        report_folder.write(suite, found[:6], {"tune x": "what </script> was wrong"}, ["edit x"], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "videos/ours--car-turn--style.mp4" in page and "what \\u003c/script> was wrong" in page
    assert len(list((tmp_path / "report" / "videos").iterdir())) == 7
    assert len(list((tmp_path / "report" / "sheets").iterdir())) == 1


def test_the_pages_data_can_end_no_script(small: Any, tmp_path: Path) -> None:
    from tav_opt.suite import report_folder

    page = report_folder.write(read_suite(small()), [], {"tune x": "<!--<script>"}, [], tmp_path / "report")
    text = page.read_text()
    begin = text.index('id="data">') + len('id="data">')
    data = text[begin : text.index("</script>", begin)]
    assert "<" not in data and json.loads(data)["faults"] == {"tune x": "<!--<script>"}


def row(method: str, edit: str, **values: float) -> Row:
    texts = {"category": "style", "caption": "a dog", "prompt": "a cat", "video": f"v-{edit}"}
    places = {"file": Path("edit.mp4"), "source": Path("source.mp4")}
    values = {name.replace("_", " "): value for name, value in values.items()}
    return Row(method=method, edit=edit, values=values, left_out={}, networks={}, **texts, **places)


def test_methods_compare_on_the_edits_for_which_all_have_a_value() -> None:
    """Motion fidelity is left out of one edit by one method: the other's mean must not count that edit either."""
    found = [
        row("ours", "a", frame_consistency=0.9, motion_fidelity=0.5),
        row("ours", "b", frame_consistency=0.9, motion_fidelity=0.1),
        row("other", "a", frame_consistency=0.8, motion_fidelity=0.4),
        row("other", "b", frame_consistency=0.8),
        row("still", "a", frame_consistency=0.7),
        row("still", "b", frame_consistency=0.7),
    ]
    table = cells(found)
    assert table["ours"]["motion fidelity"].mean == 0.5 and table["ours"]["motion fidelity"].edits == 1
    assert table["other"]["motion fidelity"].mean == 0.4 and "motion fidelity" not in table["still"]
    assert table["ours"]["frame consistency"].edits == 2
    told = as_markdown("x", table, ["frame consistency", "motion fidelity"])
    assert "| ours | 2 | **0.900** (0.900 … 0.900) | **0.500**, of 1 |" in told


def test_two_encoders_in_one_table_are_refused() -> None:
    found = [row("ours", "a", x=1.0), row("ours", "b", x=1.0)]
    found = [replace(each, networks={"encoder": name}) for each, name in zip(found, ("CLIP", "demo"), strict=True)]
    with pytest.raises(InputError, match="ours v-b b: encoder demo, other edits CLIP"):
        results.check_networks(found)


def test_a_worker_that_would_measure_by_something_else_says_so(small: Any, tmp_path: Path) -> None:
    """As on a node without CLIP, which would take the demo's encoder, or without OpenCV."""
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4", FRAMES)
    suite = read_suite(small(methods={"x": {"folder": "done"}}))
    found = measured_by(suite.metrics)
    other = replace(suite, measured_by=found | {"cv2": "0.0"})
    here = workshop.Workshop(other, HERE, UnitStore(tmp_path / "out"))
    planned = units(other, HERE)
    for unit in planned[:2]:
        here.do(unit)
    with pytest.raises(InputError, match=f"would measure by cv2 {found['cv2'] or 'nothing'}, the driver by 0.0"):
        here.do(planned[2])
    assert not UnitStore(tmp_path / "out").done(planned[2])


# Faults.


def test_a_broken_video_is_reported_and_the_others_are_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "dog.mp4").read_bytes()[:700])
    path = small(videos=[entry("broken.mp4"), entry("dog.mp4")])
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 1 and "tav-opt evaluate: source broken: " in error and "3 units need what failed" in error
    assert ended(error)[-1] == "measure ours--dog--subject" and "Traceback" not in error
    told = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert list(told["faults"]) == ["source broken"] and len(told["not done for them"]) == 3
    shutil.copyfile(tmp_path / "dog.mp4", tmp_path / "broken.mp4")
    workshop_units.cache_clear()
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 0 and len(ended(error)) == 4, "only what was broken"


@pytest.mark.parametrize(
    ("white", "frames", "words"),
    [(False, 2, "need 5; it has 2"), (True, 5, "is white all over"), (False, 0, "holds no images")],
)
def test_a_mask_that_will_not_do_is_said_before_tuning(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], white: bool, frames: int, words: str
) -> None:
    (tmp_path / "mask").mkdir()
    picture = np.full((64, 64), 255 if white else 0, np.uint8)
    for number in range(frames):
        Image.fromarray(picture).save(tmp_path / "mask" / f"{number}.png")
    status, _, error = evaluate(capsys, small(videos=[entry("dog.mp4", mask="mask")]), "--out", tmp_path / "out")
    assert status == 1 and ended(error) == ["source dog"] and words in error and "3 units need what failed" in error


from tav_opt.suite.units import content as workshop_units  # noqa: E402


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"videos": [entry("absent.mp4")]}, "absent.mp4"),
        ({"methods": {"ours": None, "x": {"folder": "done"}}}, "done/dog/subject"),
        ({"model": "nowhere"}, "model 'nowhere' is neither"),
        ({"metrics": {"clip": "nowhere"}}, "model 'nowhere' is neither"),
        ({"edit": {"negative_prompt": "a blurred panda " * 4}}, "ours: 'a blurred panda"),
        ({"clip": {"frames": FRAMES, "height": 60, "width": 64}}, "dog: size 64×60 is not a multiple of"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    words: str,
) -> None:
    status, _, error = evaluate(capsys, small(**more), "--out", tmp_path / "out")
    assert status == 2 and words in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("units/*"))


def test_a_full_disk_ends_it_and_leaves_what_was_whole(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workshop, "measure", full)
    path = small(methods={"ready": {"folder": "done"}}, videos=[entry("dog.mp4"), entry("dog.mp4", name="other")])
    for name in ("dog", "other"):
        (tmp_path / "done" / name).mkdir(parents=True)
        random_video(tmp_path / "done" / name / "subject.mp4", FRAMES)
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 2 and "disk full" in error.splitlines()[-1], error
    assert ended(error) == ["source dog", "edit ready--dog--subject"], "nothing that would fail alike is begun"
    assert not list((tmp_path / "out").rglob("metrics.json"))
    monkeypatch.undo()
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 0 and len(ended(error)) == 4, "what was whole is kept"


def test_prompts_that_are_too_long_are_said_before_anything_is_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edits = [{"prompt": "a panda " * 9}]
    status, _, error = evaluate(capsys, small(videos=[entry("dog.mp4", edits=edits)]), "--out", tmp_path / "out")
    assert status == 2 and "dog: 'a panda" in error and "tokens long, 16 at most" in error and not ended(error)


def test_nan_in_a_metric_is_a_fault_of_its_unit(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tav_opt.metrics.measuring.warping_error", lambda *_: float("nan"))
    status, _, error = evaluate(capsys, small(), "--out", tmp_path / "out")
    assert status == 1 and "measure ours--dog--subject: warping error is nan" in error


def test_a_finished_video_of_another_length_is_named(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4", FRAMES + 1)
    status, _, error = evaluate(capsys, small(methods={"x": {"folder": "done"}}), "--out", tmp_path / "out")
    assert status == 1 and f"subject.mp4 has {FRAMES + 1} frames, the clip {FRAMES}" in error


def test_each_model_is_loaded_once_for_all_that_need_it(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips are tuned and edited on one base, then the image model does its units, whatever the suite's order."""
    random_video(tmp_path / "other.mp4", seed=1)
    videos = [entry("dog.mp4"), entry("other.mp4")]
    methods = {"ours": None, "per-frame": None, "from-noise": {"edit": {"inversion": False}}}
    status, _, error = evaluate(capsys, small(videos=videos, methods=methods), "--out", tmp_path / "out")
    assert status == 0, error
    done = [unit for unit in ended(error) if not unit.startswith("measure")]
    assert done[:3] == ["source dog", "source other", "tune dog"] and done[-1].startswith("edit per-frame--other")
    abouts = [read_object(path) for path in (tmp_path / "out" / "units").glob("*/*/unit.json")]
    assert sum(about["model_loaded"] for about in abouts) == 2 and len(abouts) == len(ended(error)) == 18


def test_one_folder_has_one_driver(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with UnitStore(tmp_path / "out").claimed():
        status, _, error = evaluate(capsys, small(), "--out", tmp_path / "out")
    assert status == 2 and "is being evaluated by another process" in error


def test_what_waits_is_taken_by_the_model_in_hand_and_given_up_with_what_it_needs() -> None:
    def unit(name: str, *needs: str, model: str = "") -> Any:
        return SimpleNamespace(id=name, needs=needs, model=model)

    first, second = unit("s1"), unit("s2")
    tuned = [unit("t1", "s1", model="video"), unit("t2", "s2", model="video")]
    inverted, edit = unit("i1", "s1", model="image"), unit("e1", "s1", "t1", model="video")
    measured = unit("m1", "s1", "e1")
    plan = [unit("s0"), first, tuned[0], inverted, edit, measured, second, tuned[1]]
    waiting = Waiting(plan, {"s0"}, lambda one: one.model)
    assert [waiting.take([]), waiting.take([]), waiting.take([])] == [first, second, None]
    waiting.end(second)
    waiting.end(first)
    assert waiting.take(["image"]) is inverted and waiting.take(["image"]) is tuned[0], "the first, where none is liked"
    assert waiting.give_up(tuned[0]) == [edit, measured] and waiting
    assert waiting.take(["video"]) is tuned[1] and not waiting


def test_time_left_counts_what_can_still_be_done() -> None:
    from collections import Counter

    progress = scheduling.Progress(10, 2, Counter({"tune": 3, "edit": 4}), {"tune": [10.0, 20.0]})
    assert progress.seconds_left() is None, "no edit was ever timed"
    progress.seconds["edit"] = [2.0]
    assert progress.seconds_left() == (3 * 15 + 4 * 2) / 2


# Captions.


def test_a_captioner_says_what_a_video_shows(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BLIP of random weights says anything; that it is said once, kept and used is looked at."""
    from transformers import BertTokenizerFast

    monkeypatch.setattr(captions, "TOKENS", 5)  # the small model reads 16
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "a", "an", "i", "o", "u"]
    text = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "projection_dim": 16}
    text |= {"num_attention_heads": 2, "bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 16})
    torch.manual_seed(0)
    folder = tmp_path / "blip"
    model = BlipForConditionalGeneration(config)
    for values in model.text_decoder.parameters():
        if values.shape == (10,):  # what is said depends on these alone, and is "a" again and again
            values.data[:] = torch.eye(10)[5] * 9
        elif values.shape == (10, 32):
            values.data.zero_()
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, tokenizer).save_pretrained(folder)
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    said = Captioner.open(str(folder), torch.device("cpu")).caption(frames)
    assert set(said.split()) <= set(words)
    video_ = {key: value for key, value in entry("dog.mp4").items() if key != "caption"}
    status, _, error = evaluate(capsys, small(videos=[video_], captioner="blip"), "--out", tmp_path / "out")
    assert status == 0, error
    (source,) = (tmp_path / "out" / "units" / "source").iterdir()
    told = json.loads((source / "source.json").read_text())
    assert told["caption_made"] and set(told["caption"].split()) <= set(words)
    (tuned,) = (tmp_path / "out" / "units" / "tune").iterdir()
    assert checkpoint.load(tuned).info.prompt == told["caption"]
    with pytest.raises(InputError, match=r"no BlipFor|cannot be loaded|is no"):
        Captioner.open(str(DEMO), torch.device("cpu"))


# Statistics.


def test_the_bootstrap_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval([[value] for value in values])
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03) and high == pytest.approx(
        values.mean() + half, abs=0.03
    )
    copies = bootstrap_interval([[value] * 4 for value in values])
    assert copies == pytest.approx((low, high), abs=0.03), "a video's four equal edits are one piece of evidence"


def test_kappa_is_that_of_fleiss_worked_example() -> None:
    """Ten items, fourteen raters, five answers (Fleiss 1971's table as textbooks have it): 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([[5, 0], [0, 5]]) == 1 and fleiss_kappa([[5, 0], [5, 0]]) is None
