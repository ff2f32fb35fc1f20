"""Suites that run, through the command: the four real clips, units done once, the report, captions."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from suites import CLIPS, FRAMES, PLACE, SIDE, ended, entry, evaluate, random_video, settings, written
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from tav_opt import checkpoint, cli, video
from tav_opt.config import InputError
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import read_object
from tav_opt.metrics.clip_encoder import DEMO
from tav_opt.suite import captions
from tav_opt.suite.captions import Captioner
from tav_opt.suite.results import rows
from tav_opt.suite.suite_file import read_suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, units

HERE = Place(**PLACE)


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
    tunes = [unit for unit in planned(suite_of_four) if (unit.kind, unit.name) == ("tune", "car-turn")]
    unit = next(unit for unit in tunes if unit.method is not None and unit.method.name == "ours")
    assert unit.method is not None and len(tunes) == 2, "another method has its own of that name"
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


def test_each_model_is_loaded_once_for_all_that_need_it(
    small: Any, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips are tuned and edited on one base, then the image model does its units, whatever the suite's order."""
    caption, stride = CLIPS["man-surfing"]
    real = entry(str(shared / "clips" / "man-surfing.mp4"), name="other", caption=caption, clip={"stride": stride})
    videos = [entry("dog.mp4"), real]
    methods = {"ours": None, "per-frame": None, "from-noise": {"edit": {"inversion": False}}}
    status, _, error = evaluate(capsys, small(videos=videos, methods=methods), "--out", tmp_path / "out")
    assert status == 0, error
    done = [unit for unit in ended(error) if not unit.startswith("measure")]
    assert done[:3] == ["source dog", "source other", "tune dog"] and done[-1].startswith("edit per-frame--other")
    abouts = [read_object(path) for path in (tmp_path / "out" / "units").glob("*/*/unit.json")]
    assert sum(about["model_loaded"] for about in abouts) == 2 and len(abouts) == len(ended(error)) == 18


def test_the_pages_data_can_end_no_script(small: Any, tmp_path: Path) -> None:
    from tav_opt.suite import report_folder

    page = report_folder.write(read_suite(small()), [], {"tune x": "<!--<script>"}, [], tmp_path / "report")
    text = page.read_text()
    begin = text.index('id="data">') + len('id="data">')
    data = text[begin : text.index("</script>", begin)]
    assert "<" not in data and json.loads(data)["faults"] == {"tune x": "<!--<script>"}


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
