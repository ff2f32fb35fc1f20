"""What every engine does: opened by the registry, compared with eager PyTorch, and served."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from exported import FRAMES, SIDE, STEPS, Exported, export_once, write_other
from served import metrics, serving, until
from tensorrt_stand_in import as_if_here, plan, stand_in

from tav_opt import editing, models
from tav_opt.client import Client
from tav_opt.config import EditConfig, EngineName, InputError, WorkerConfig
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.engines.tensorrt_library import Target
from tav_opt.export import compiled, exporting
from tav_opt.export.tensorrt import build
from tav_opt.repository.layout import info_of
from tav_opt.serving.host.server import ServerDied
from tav_opt.serving.resident import Clips

CPU = torch.device("cpu")
GIB = 1 << 30
KINDS = ("pytorch", "onnxruntime", "compiled", *get_args(Target))


@dataclass(frozen=True)
class Tolerance:
    """How far an engine may be from eager PyTorch in float32."""

    predict: float
    latents: float
    mean: float
    """Of 255, in the mean, under guidance on random weights."""
    most: int


FULL = Tolerance(predict=2e-5, latents=1e-5, mean=0.05, most=2)
HALF = Tolerance(predict=2e-2, latents=5e-3, mean=3.0, most=48)


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def other(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(exported, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def repository(exported: Exported, other: Path) -> Path:
    """With two clips on one base, its compiled programs, and the engines of both stand-ins."""
    exporting.export(other, exported.repository, name="other")
    clip = exported.version / "clips" / "first"
    compiled.export(clip)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        for target in get_args(Target):
            build.export(plan(target=target), clip)
    return exported.repository


@pytest.fixture(scope="module")
def eager(exported: Exported) -> TorchEngine:
    return open_checkpoint(exported.checkpoint)


@pytest.fixture(scope="module", params=KINDS)
def name(request: pytest.FixtureRequest) -> Iterator[EngineName]:
    """Each engine by the name that users know it by."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param in get_args(Target):
            as_if_here(patch, request.param)
            yield "tensorrt"
        else:
            yield request.param


@pytest.fixture(scope="module")
def engine(name: EngineName, repository: Path) -> ExportedEngine:
    return registry.open_clip(repository, "first", engine=name, device=CPU, threads=1)


@pytest.fixture(scope="module")
def tolerance(name: EngineName) -> Tolerance:
    return HALF if name == "tensorrt" else FULL


def assert_same_frames(found: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> None:
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert found.shape == expected.shape
    assert expected.std() > 10, "an image without contrast proves nothing"
    assert difference.mean() <= tolerance.mean, f"{difference.mean():.3f}"
    assert difference.max() <= tolerance.most, difference.max()


@pytest.mark.parametrize(("inversion_steps", "iterations"), [(STEPS, 0), (STEPS + 1, 0), (STEPS, 2)])
def test_edit_is_the_eager_one(
    engine: ExportedEngine, eager: TorchEngine, tolerance: Tolerance, inversion_steps: int, iterations: int
) -> None:
    """With the clip's own inverted latents, and inverted anew."""
    if iterations and tolerance is HALF:
        pytest.skip("four refined steps of a random network amplify fp16's rounding; all engines share the loop")
    config = EditConfig(
        prompts=("a cat is skiing", "a bear"),
        negative_prompt="blurry",
        steps=4,
        guidance_scale=7.5,
        eta=0.5,
        inversion_steps=inversion_steps,
        inversion_iterations=iterations,
    )
    found, expected = editing.edit(engine, config), editing.edit(eager, config)
    assert found.shape == (2, FRAMES, SIDE, SIDE, 3)
    assert_same_frames(found, expected, tolerance)
    other = np.abs(expected.astype(int) - expected[::-1]).mean()
    assert np.abs(found.astype(int) - expected).mean() < 0.2 * other, "as far from the truth as another prompt's edit"


@pytest.mark.parametrize("b", [1, 2, 3, 5])
def test_predict_at_any_batch(engine: ExportedEngine, eager: TorchEngine, tolerance: Tolerance, b: int) -> None:
    generator = torch.Generator().manual_seed(b)
    latents = torch.randn((b, *engine.source_latents.shape[1:]), generator=generator)
    text = torch.randn((b, engine.base.tokens, 32), generator=generator)
    expected = eager.predict(latents, 501, text)
    torch.testing.assert_close(engine.predict(latents, 501, text), expected, atol=tolerance.predict, rtol=0)


def test_earlier_results_stay(engine: ExportedEngine) -> None:
    """Outputs are fresh memory, not a buffer that the next call overwrites."""
    text = engine.encode_text(["a cat"])
    kept = text.clone()
    engine.encode_text(["a dog is surfing"])
    assert torch.equal(text, kept)


def test_frames_pass_both_ways(
    engine: ExportedEngine, eager: TorchEngine, exported: Exported, tolerance: Tolerance
) -> None:
    latents = engine.encode_video(exported.frames)
    torch.testing.assert_close(latents, eager.encode_video(exported.frames), atol=tolerance.latents, rtol=0)
    three = torch.cat([latents, -latents])[:, :, :3]  # frames that fill no batch
    difference = np.abs(engine.decode(three).astype(int) - eager.decode(three).astype(int))
    assert difference.max() <= 2


def test_other_size_is_refused(engine: ExportedEngine) -> None:
    with pytest.raises(InputError, match=r"\(4, 64, 64, 3\)"):
        engine.encode_video(np.zeros((FRAMES, 32, SIDE, 3), np.uint8))


def test_words_beyond_the_length_are_named(engine: ExportedEngine, eager: TorchEngine) -> None:
    prompt = "a panda is skiing down the wide white mountain in the evening"
    with pytest.raises(InputError) as expected:
        eager.encode_text([prompt])
    with pytest.raises(InputError) as found:
        engine.encode_text(["a cat", prompt])
    assert str(found.value) == str(expected.value)


def test_tokens_are_those_of_the_tokenizer(engine: ExportedEngine, eager: TorchEngine) -> None:
    odd = [
        "",
        " ",
        "A Panda is SKIING",
        "é ünï 日本",
        "🐼",
        " a  b\tc\n",
        "don't",
        "x <|endoftext|> y",
        "a\x00b",
        "ﬁ½Ⅷ",
    ]
    for prompt in odd:
        assert torch.equal(engine.base.tokenize([prompt]), models.tokenize(eager.sd.tokenizer, [prompt])), repr(prompt)


def test_clips_of_one_base_take_turns(
    engine: ExportedEngine, repository: Path, exported: Exported, other: Path, tolerance: Tolerance
) -> None:
    second = ExportedEngine.open(exported.version / "clips" / "other", engine.base)
    text = engine.encode_text(["a cat"])
    truths = [open_checkpoint(path) for path in (exported.checkpoint, other)]
    noises = [truth.predict(engine.inverted_latents, 301, text) for truth in truths]
    assert (noises[0] - noises[1]).abs().max() > 1e-1, "the clips must differ by more than a tolerance"
    for clip, noise in ((second, noises[1]), (engine, noises[0]), (engine, noises[0]), (second, noises[1])):
        found = clip.predict(engine.inverted_latents, 301, text)
        torch.testing.assert_close(found, noise, atol=tolerance.predict, rtol=0)


def test_a_clip_of_another_base_is_refused(engine: ExportedEngine, exported: Exported, tmp_path: Path) -> None:
    elsewhere = replace(engine.base, folder=tmp_path / "0123456789abcdef-4x64x64")
    with pytest.raises(InputError, match="belongs to base"):
        ExportedEngine.open(exported.version / "clips" / "first", elsewhere)


def test_memory_is_told_before_it_is_taken(engine: ExportedEngine) -> None:
    latents = engine.source_latents.nbytes + engine.inverted_latents.nbytes
    assert engine.held_bytes > latents
    one, two = engine.extra_bytes(1), engine.extra_bytes(2)
    assert 0 < one <= two and engine.extra_bytes(1, encode=True) >= one


def test_a_server_s_clips_are_found_replaced_and_removed(name: EngineName, repository: Path, tmp_path: Path) -> None:
    """Opened when asked for, opened anew when exported anew, gone with their folder; the base stays for the other."""
    copied = Path(shutil.copytree(repository, tmp_path / "repository"))
    (version,) = copied.glob("*stream/1")
    chosen: list[str] = []
    clips = Clips(
        version,
        limit=GIB,
        engine=name,
        threads=1,
        on_choice=lambda _base, choice: chosen.append(choice.engine),
    )
    first, second = clips.get("first"), clips.get("other")
    assert chosen == [name] and first.base is second.base and first.base.engine == name
    assert clips.get("first") is first and clips.resident() == (2, first.held_bytes + second.held_bytes)
    shutil.copytree(version / "clips" / "other", version / "clips" / ".fresh")
    shutil.rmtree(version / "clips" / "first")
    (version / "clips" / ".fresh").rename(version / "clips" / "first")
    anew = clips.get("first")
    assert anew is not first and anew.revision != first.revision
    small = Clips(version, limit=first.held_bytes, engine=name, threads=1)
    small.get("first"), small.get("other")
    assert small.resident()[0] == 1


def test_each_engine_has_a_revision_of_its_own(repository: Path, exported: Exported) -> None:
    """An inversion that one engine made is not another's: they differ in the last bits, or in more."""
    names: tuple[EngineName, ...] = ("pytorch", "onnxruntime", "compiled")
    engines = [registry.open_clip(repository, "first", engine=name, device=CPU) for name in names]
    assert len({engine.revision for engine in engines}) == len(names)


def test_auto_takes_the_first_that_can_and_says_why_the_others_cannot(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(exported.version / "clips" / "first")
    base = Path(shutil.copytree(exported.base, tmp_path / exported.base.name, ignore=lambda *_: ["engines"]))
    assert registry.choose(base, info, CPU).engine == "onnxruntime"
    monkeypatch.setitem(registry.ORDER, "cpu", ("compiled", "onnxruntime"))
    choice = registry.choose(base, info, CPU)
    assert choice.engine == "onnxruntime" and set(choice.passed_over) == {"compiled"}
    assert str(choice).startswith("onnxruntime on cpu; compiled: no programs for torch")


def test_a_named_engine_that_does_not_fit_is_an_error(exported: Exported, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    for folder in copied.glob("*/1/base/*/engines"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"compiled: no programs .*--target compiled"):
        registry.open_clip(copied, "first", engine="compiled", device=CPU)
    with pytest.raises(InputError, match=r"tensorrt: .*"):
        registry.open_clip(copied, "first", engine="tensorrt", device=CPU)


def test_programs_of_another_machine_are_not_run(repository: Path, exported: Exported, tmp_path: Path) -> None:
    """Instructions that a processor lacks end the process: the features are compared before anything is loaded."""
    from tav_opt.engines import compiled as engine
    from tav_opt.files import read_json, write_json

    base = Path(shutil.copytree(exported.base, tmp_path / exported.base.name))
    info = info_of(exported.version / "clips" / "first")
    manifest = engine.folder_of(base, CPU) / "manifest.json"
    found = read_json(manifest)
    write_json(manifest, found | {"machine": found["machine"] | {"features": ["fpu", "avx1024"]}})
    assert "avx1024" in str(engine.why_not(base, info, CPU))
    write_json(manifest, found | {"made_of": {}})
    assert "other graphs" in str(engine.why_not(base, info, CPU))


def test_serving_names_no_engine() -> None:
    """It asks the registry: what runs a clip is known in engines/ alone."""
    root = Path(registry.__file__).parents[1] / "serving"
    for path in root.rglob("*.py"):
        text = path.read_text()
        for word in ("OnnxGraphs", "TensorRtGraphs", "CompiledGraphs", "TorchGraphs", "engines.onnxruntime"):
            assert word not in text, f"{path} names {word}"
        assert "import onnxruntime" not in text, path


@pytest.mark.parametrize("engine", ["compiled", "onnxruntime"])
def test_the_real_server_edits_by_the_engine_that_is_named(
    repository: Path, eager: TorchEngine, tmp_path: Path, engine: EngineName
) -> None:
    """And says which one: at the start, in the request's log line, in the edit's metadata, in the metrics."""
    config = EditConfig(prompts="a cat is skiing", steps=3, guidance_scale=7.5)
    settings = WorkerConfig(engine=engine, cache=tmp_path / "cache")
    with serving(repository, settings) as server, Client(server.grpc_url) as client:
        edit = client.edit("first", config)
        until(lambda: any(f": {engine} on cpu" in line for line in list(server.log)))
        until(lambda: any(f"engine={engine}" in line for line in list(server.log)))
        until(lambda: metrics(server)[f'tav_opt_edits_total{{engine="{engine}"}}'] == 1)
    assert edit.metadata[0]["engine"] == engine
    assert_same_frames(edit.frames, editing.edit(eager, config), FULL)


def test_the_server_does_not_start_on_a_named_engine_that_does_not_fit(repository: Path) -> None:
    with (
        pytest.raises(ServerDied, match=r"no engine for base .* tensorrt: "),
        serving(repository, WorkerConfig(engine="tensorrt")),
    ):
        pass
