"""A suite's file: what may stand in it, what is refused in one line; its units, and what they will take."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from suites import entry, evaluate, random_video, written

from tav_opt.base.directory import Base
from tav_opt.config import ClipConfig, EditConfig, InputError, TrainConfig
from tav_opt.demo.subjects import MOVING
from tav_opt.memory import outline
from tav_opt.metrics.left_out import LeftOut
from tav_opt.models import StableDiffusion
from tav_opt.suite import planning
from tav_opt.suite import units as module
from tav_opt.suite.planning import Plan, plan_of
from tav_opt.suite.suite_file import read_suite
from tav_opt.suite.units import Place, missing_files, units

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GPU = Place(device="cuda", dtype="float16")


def suite(folder: Path, **more: Any) -> Any:
    content = {"model": "m", "videos": [entry("dog.mp4")]} | more
    return read_suite(written(folder, {key: value for key, value in content.items() if value is not None}))


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    found = suite(tmp_path)
    (method,), (video,) = found.methods, found.videos
    assert (method.name, method.kind, method.tune, method.edit) == ("ours", "tune-a-video", TrainConfig(), EditConfig())
    assert video.clip == ClipConfig(video=tmp_path / "dog.mp4") and video.edits[0].name == "subject"


def test_the_demos_suite_is_what_its_maker_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 clips of subjects that no setting was chosen on, an edit of each of the paper's kinds."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    maker = runpy.run_path(str(BENCHMARKS / "demo_suite.py"))
    text = (BENCHMARKS / "demo_suite.yaml").read_text()
    assert text == maker["suite"]()
    found = read_suite(written(tmp_path, text))
    assert len(found.videos) == 16 and found.edits == 64 and len(found.methods) == 6
    assert not {video.name for video in found.videos} & set(MOVING)
    for video in found.videos:
        assert [edit.category for edit in video.edits] == ["subject", "background", "style", "mixed"]
        assert len({video.caption, *(edit.prompt for edit in video.edits)}) == 5


def test_settings_of_the_suite_of_a_video_and_of_a_method(tmp_path: Path) -> None:
    found = suite(
        tmp_path,
        clip={"frames": 8, "stride": 1},
        tune={"steps": 100, "lr": "3e-4"},
        edit={"steps": 20},
        methods={
            "ours": None,
            "untuned": {"tune": {"steps": 1, "lr": 0}},
            "per-frame": {},
            "alone": {"attention": "each-frame"},
            "cogvideo": {"folder": "done"},
        },
        videos=[entry("dog.mp4", clip={"stride": 3}), entry("cat.mp4", edits=["a cow", "a pig"])],
    )
    ours, untuned, per_frame, alone, cogvideo = found.methods
    assert (ours.tune.steps, ours.tune.lr, untuned.tune.steps, untuned.tune.lr) == (100, 3e-4, 1, 0)
    assert (per_frame.kind, per_frame.edit.steps, alone.attention) == ("per-frame", 20, "each-frame")
    assert (cogvideo.kind, cogvideo.folder) == ("folder", tmp_path / "done")
    dog, cat = found.videos
    assert (dog.clip.stride, dog.clip.frames, cat.clip.stride) == (3, 8, 1)
    assert [edit.name for edit in cat.edits] == ["mixed", "mixed-2"] and found.edits == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"colour": 1}, "unknown key colour: there are captioner, clip, edit, manifest, methods, metrics, model"),
        ({"model": None}, "key model is missing"),
        ({"tune": {"step": 5}}, "unknown key tune.step"),
        ({"tune": {"steps": "many"}}, "steps: 'many' is not int"),
        ({"tune": {"steps": 0}}, "steps 0 is not within 1"),
        ({"tune": {"warmup": 900}}, "warmup 900 is more than the 500 steps"),
        ({"edit": {"prompts": ["x"]}}, "unknown key edit.prompts"),
        ({"edit": {"guidance_scale": -1}}, "guidance scale -1.0 is not within"),
        ({"clip": {"video": "x"}}, "unknown key clip.video"),
        ({"clip": 5}, "clip: 5 is not settings"),
        ({"metrics": {"clip": 5}}, "clip: 5 is not"),
        ({"videos": []}, r"videos: \[\] is not a list of one or more"),
        ({"manifest": {"kind": "tgve", "file": "x", "folder": "y"}}, "either videos or a manifest"),
        ({"videos": [entry("dog.mp4"), entry("other/dog.mp4")]}, "videos: two of the name dog"),
        ({"videos": [entry("dog.mp4", name="Dog"), entry("cat.mp4", name="dog")]}, "two of the name dog"),
        ({"videos": [entry("dog.mp4", name="../dog")]}, "name '../dog' is not"),
        ({"videos": [entry("dog.mp4", prompts=[])]}, r"unknown key videos\[1\].prompts"),
        ({"videos": [{"caption": "x", "edits": ["y"]}]}, r"key videos\[1\].video is missing"),
        ({"videos": [entry("dog.mp4", edits=[])]}, "dog: edits: give one or more"),
        ({"videos": [entry("dog.mp4", edits=[{"category": "style"}])]}, r"key dog: edits\[1\].prompt is missing"),
        ({"videos": [entry("dog.mp4", edits=[{"prompt": " "}])]}, "caption or prompt ' ' is empty"),
        ({"videos": [entry("dog.mp4", edits=[{"prompt": "x", "category": "size"}])]}, "category: 'size' is not"),
        ({"videos": [entry("dog.mp4", edits=[{"prompt": "x", "name": "a"}] * 2)]}, "dog: edits: two of the name a"),
        ({"videos": [entry("dog.mp4", caption=None)]}, "dog has no caption"),
        ({"methods": ["ours", "ours"]}, "methods: two of the name ours"),
        ({"methods": {"ours": {"kind": "magic"}}}, "kind: 'magic' is not"),
        (
            {"methods": {"per-frame": {"tune": {}}}},
            "per-frame.tune does nothing for a method of kind per-frame",
        ),
        ({"methods": {"x": {"kind": "folder"}}}, "key methods.x.folder is missing"),
        ({"methods": {"x": {"folder": "y", "edit": {}}}}, "methods.x.edit does nothing"),
        ({"methods": {"a b": None}}, "name 'a b' is not"),
        ({"methods": {"ours": {"edit": {"solver": "unipc", "eta": 0.5}}}}, "ours: eta 0.5 with solver unipc"),
        (
            {"methods": {"plug-and-play": {"edit": {"inversion_iterations": 2}}}},
            "plug-and-play.edit.inversion_iterations does nothing for a method of kind plug-and-play",
        ),
        (
            {"methods": ["per-frame"], "edit": {"inversion_iterations": 2}},
            "edit.inversion_iterations does nothing: no method is of kind tune-a-video",
        ),
        (
            {"methods": {"per-frame": {"edit": {"keep": "motion"}}}},
            "per-frame.edit.keep does nothing for a method of kind per-frame",
        ),
        ({"methods": ["per-frame"], "edit": {"keep": "motion"}}, "edit.keep does nothing: no method is of kind"),
        ({"methods": {}}, "methods: give one or more"),
    ],
)
def test_mistakes_are_one_line_that_names_them(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        suite(tmp_path, **more)
    assert str(caught.value).startswith(str(tmp_path / "suite.yaml")) and "\n" not in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = "model: m\nvideos: [{video: dog.mp4, caption: a dog, edits: [a cat]}]\ntune: {steps: 5}\ntune: {steps: 6}\n"
    with pytest.raises(InputError, match=r"'tune' stands twice .*line 4"):
        read_suite(written(tmp_path, text))
    with pytest.raises(InputError, match="'steps' stands twice"):
        read_suite(written(tmp_path, text.replace("tune: {steps: 6}", "edit: {steps: 6, steps: 7}")))
    merged = "edit: &usual {steps: 6}\nmethods: {ours: {edit: {<<: *usual, steps: 7}}}"
    found = read_suite(written(tmp_path, text.replace("tune: {steps: 6}", merged)))
    assert found.methods[0].edit.steps == 7, "what is merged gives way, as YAML has it"


def test_models_are_found_beside_the_file_and_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "sd").mkdir(parents=True)
    (tmp_path / "sd.safetensors").touch()
    assert suite(tmp_path, model="sd.safetensors").model == str(tmp_path / "sd.safetensors")
    assert suite(tmp_path, model="~/sd", metrics={"clip": "~/sd"}).model == str(tmp_path / "home" / "sd")
    assert suite(tmp_path, model="owner/name").model == "owner/name"


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4")
    methods = {"ours": None, "cogvideo": {"folder": "done"}}
    found = suite(tmp_path, methods=methods, videos=[entry("dog.mp4", mask="mask"), entry("cat.mp4")])
    gone = missing_files(found)
    assert len(gone) == 4 and [name for name in gone if "cat.mp4" in name and name.startswith("video")]
    assert f"mask {tmp_path / 'mask'}" in gone and f"cogvideo's edit {tmp_path / 'done'}/cat/subject" in gone


# Units and their keys.


def keys(path: Path) -> dict[str, str]:
    return {unit.name + unit.kind: unit.key for unit in units(read_suite(path), Place(device="cpu", dtype="float32"))}


def test_a_unit_is_known_by_all_that_it_depends_on(small, tmp_path: Path) -> None:
    methods = {"ours": None, "per-frame": None}
    before = keys(small(methods=methods))
    assert len(before) == 1 + 2 * 3 and len(set(before.values())) == 7
    assert keys(small(methods=methods)) == before
    tuned = keys(small(methods=methods, tune={"steps": 3, "inversion_steps": 2}))
    changed = {name for name in before if tuned[name] != before[name]}
    assert changed == {"dogtune", "ours--dog--subjectedit", "ours--dog--subjectmeasure"}
    saved = keys(small(methods=methods, tune={"steps": 2, "inversion_steps": 2, "save_every": 7}))
    assert saved == before, "how often a state is saved changes nothing"
    prompt = keys(small(methods=methods, videos=[entry("dog.mp4", edits=[{"prompt": "a cow", "category": "subject"}])]))
    assert {name for name in before if prompt[name] != before[name]} == {n for n in before if "subject" in n}
    assert set(keys(small(methods=methods, edit={"steps": 2, "seed": 5})).items()) & set(before.items()) == {
        (name, before[name]) for name in before if "subject" not in name
    }
    from tav_opt.suite.units import content

    content.cache_clear()
    (tmp_path / "dog.mp4").unlink()
    random_video(tmp_path / "dog.mp4", seed=1)
    assert not set(keys(small(methods=methods)).values()) & set(before.values())


def test_what_makes_a_metric_exist_is_in_the_key(small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(squeeze_net: Path, *absent: str) -> dict[str, str]:
        def library(name: str, package: str) -> Any:
            if name in absent:
                raise LeftOut(package)
            return SimpleNamespace(__version__="1.0")

        monkeypatch.setattr(module, "library", library)
        monkeypatch.setattr(module, "perceptual_weights", lambda: squeeze_net)
        module.libraries.cache_clear()
        return keys(small())

    file, other = (tmp_path / name for name in ("one.pth", "other.pth"))
    file.write_bytes(b"values")
    other.write_bytes(b"other values")
    try:
        before = found(file)
        for after in (found(file, "cv2"), found(file, "torchmetrics"), found(other)):
            assert {name for name in before if after[name] != before[name]} == {"ours--dog--subjectmeasure"}
        assert found(file) == before
    finally:
        module.libraries.cache_clear()


def test_one_gpu_computes_as_another(small) -> None:
    found = read_suite(small())
    one, other = (units(found, Place(device=device, dtype="float16")) for device in ("cuda", "cuda:1"))
    assert [unit.key for unit in one] == [unit.key for unit in other]


def test_what_methods_share_is_called_by_the_video(small) -> None:
    found = read_suite(small(methods=["ours", "per-frame", "plug-and-play"]))
    names = {unit.id.rpartition("-")[0] for unit in units(found, GPU, hashed=False) if unit.kind in ("tune", "invert")}
    assert names == {"tune/dog", "invert/dog"}


# Plans.


@pytest.fixture(scope="module", autouse=True)
def outlines() -> Iterator[None]:
    """Models without values are made once: nothing changes them, and it takes seconds."""
    made: dict[Any, Any] = {}

    def of(base: Base, dtype: torch.dtype = torch.float32) -> StableDiffusion:
        key = base.path, dtype
        made[key] = made.get(key) or outline.of(base, dtype)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "outline", SimpleNamespace(of=of))
        yield


def plan(folder: Path, **more: Any) -> Plan:
    found = suite(folder, **more)
    return plan_of(found, units(found, GPU, hashed=False), GPU)


def test_all_of_tgve_is_planned_without_its_videos(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "model": "CompVis/stable-diffusion-v1-4",
        "clip": {"frames": 32, "stride": 1, "height": 480, "width": 480},
        "manifest": {"kind": "tgve", "file": str(shared / "suites" / "tgve.csv"), "folder": "absent"},
        "methods": ["ours", "per-frame", "plug-and-play"],
    }
    status, out, error = evaluate(capsys, written(tmp_path, told), "--dry")
    assert status == 0 and not error and "76 videos, 304 edits, 3 methods" in out
    assert "ESTIMATE, not a measurement" in out and "64 GPUs" in out and "files that it needs are not here" in out
    lines = [line.split() for line in out.splitlines()]
    found = {line[0]: line[1:] for line in lines if len(line) == 5 and line[1].isdigit()}
    counts = {kind: int(numbers[0]) for kind, numbers in found.items()}
    assert counts == {"source": 76, "tune": 76, "invert": 76, "edit": 912, "measure": 912, "all": 2052}
    # 74.35 M trained values (DESIGN.md) in fp16, and two latents of 32 × 4 × 60 × 60 in fp32, each of 76 clips.
    bytes_kept = 76 * (2 * 74.35e6 + 2 * 4 * 32 * 4 * 60 * 60)
    assert float(found["tune"][3]) == pytest.approx(bytes_kept / 2**30, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_is_that_of_the_dtype(tmp_path: Path, dtype: str) -> None:
    """Stable Diffusion's 860 M values, the inflated ones' 80 M, the VAE's 84 M and the text encoder's 123 M."""
    place = Place(device="cuda", dtype=dtype)
    small = {"frames": 1, "stride": 1, "height": 64, "width": 64}
    told = {"model": "CompVis/none", "clip": small, "edit": {"steps": 1}, "methods": ["ours", "per-frame"]}
    found = suite(tmp_path, **told)
    planned = plan_of(found, units(found, place, hashed=False), place)
    model = 1.147e9 * (2 if dtype == "float16" else 4) / 2**30
    assert model < planned.needs["edit"].gib < model + 0.5
    assert planned.gib == max(need.gib for need in planned.needs.values()) + planned.networks_gib
    assert planned.networks_gib == pytest.approx(1.6) and planned.needs["measure"].gib > 1.6, "CLIP's ViT-L/14"


def test_tuning_that_may_checkpoint_is_planned_with_it(tmp_path: Path) -> None:
    def gib(**tune: Any) -> float:
        return plan(tmp_path, model="CompVis/none", clip={"frames": 8, "stride": 1}, tune=tune).needs["tune"].gib

    assert gib() == gib(gradient_checkpointing=True) < gib(gradient_checkpointing=False) - 1


def test_operations_are_those_of_the_literature(tmp_path: Path) -> None:
    """Stable Diffusion's image UNet takes about 0.8 TFLOP at 512²; ours looks at twice as many keys, and at time."""
    at = {"model": "CompVis/none", "clip": {"frames": 4, "stride": 1}, "edit": {"steps": 1}}
    one = plan(tmp_path, methods=["per-frame"], **at).needs["invert"].flop
    many = plan(tmp_path, methods=["per-frame"], **{**at, "edit": {"steps": 2}}).needs["invert"].flop
    assert 0.8e12 < (many - one) / 4 < 1.2e12


def test_hours_are_turns(tmp_path: Path) -> None:
    planned = plan(tmp_path, model="CompVis/none", clip={"frames": 2, "stride": 1, "height": 64, "width": 64})
    assert planned.hours(1, 1.0) == pytest.approx(planned.flop / 1e12 / 3600)
    assert planned.hours(8, 1.0) == pytest.approx(planned.hours(1, 1.0)), "one video is one turn"
