"""The ONNX Runtime engine against eager PyTorch, part by part and as a whole edit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import FRAMES, SIDE, STEPS, Exported, export_once, write_other

from tav_opt import editing, models
from tav_opt.config import EditConfig, InputError
from tav_opt.engines.onnxruntime import OnnxBase, OnnxEngine, open_clip
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.export import repository


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def eager(exported: Exported) -> TorchEngine:
    return open_checkpoint(exported.checkpoint)


@pytest.fixture(scope="module")
def engine(exported: Exported) -> OnnxEngine:
    return open_clip(exported.repository, "first", threads=2)


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.repository, tmp_path / "repository"))


def assert_same_frames(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert found.shape == expected.shape
    assert difference.mean() <= 0.05 and difference.max() <= 2, f"{difference.mean():.3f}, {difference.max()}"


@pytest.mark.parametrize("inversion_steps", [STEPS, STEPS + 1])
def test_edit_is_the_eager_one(engine: OnnxEngine, eager: TorchEngine, inversion_steps: int) -> None:
    """With the clip's own inverted latents, and inverted anew."""
    config = EditConfig(
        prompts=("a cat is skiing", "a bear"),
        negative_prompt="blurry",
        steps=4,
        guidance_scale=7.5,
        eta=0.5,
        inversion_steps=inversion_steps,
    )
    found, expected = editing.edit(engine, config), editing.edit(eager, config)
    assert found.shape == (2, FRAMES, SIDE, SIDE, 3)
    assert expected.std() > 10, "an image without contrast proves nothing"
    assert_same_frames(found, expected)


@pytest.mark.parametrize("b", [1, 2, 3, 17])
def test_predict_at_any_batch(engine: OnnxEngine, eager: TorchEngine, b: int) -> None:
    generator = torch.Generator().manual_seed(b)
    latents = torch.randn((b, *engine.source_latents.shape[1:]), generator=generator)
    text = torch.randn((b, engine.base.tokens, 32), generator=generator)
    expected = eager.predict(latents, 501, text)
    torch.testing.assert_close(engine.predict(latents, 501, text), expected, atol=2e-5, rtol=0)


def test_earlier_results_stay(engine: OnnxEngine) -> None:
    """Outputs are fresh memory, not a buffer that the next call overwrites."""
    text = engine.encode_text(["a cat"])
    kept = text.clone()
    engine.encode_text(["a dog is surfing"])
    assert torch.equal(text, kept)


def test_frames_pass_both_ways(engine: OnnxEngine, eager: TorchEngine, exported: Exported) -> None:
    latents = engine.encode_video(exported.frames)
    torch.testing.assert_close(latents, eager.encode_video(exported.frames), atol=1e-5, rtol=0)
    both = torch.cat([latents, -latents])
    assert_same_frames(engine.decode(both), eager.decode(both))


def test_other_size_is_refused(engine: OnnxEngine) -> None:
    with pytest.raises(InputError, match=r"\(4, 64, 64, 3\)"):
        engine.encode_video(np.zeros((FRAMES, 32, SIDE, 3), np.uint8))


ODD = ["", " ", "A Panda is SKIING", "é ünï 日本", "🐼", " a  b\tc\n", "don't", "x <|endoftext|> y", "a\x00b", "ﬁ½Ⅷ"]


def test_tokens_are_those_of_the_tokenizer(engine: OnnxEngine, eager: TorchEngine) -> None:
    for prompt in ODD:
        expected = models.tokenize(eager.sd.tokenizer, [prompt])
        assert torch.equal(engine.base.tokenize([prompt]), expected), repr(prompt)
    torch.testing.assert_close(engine.encode_text(ODD), eager.encode_text(ODD), atol=1e-5, rtol=0)


def test_words_beyond_the_length_are_named(engine: OnnxEngine, eager: TorchEngine) -> None:
    prompt = "a panda is skiing down the wide white mountain in the evening"
    with pytest.raises(InputError) as expected:
        eager.encode_text([prompt])
    with pytest.raises(InputError) as found:
        engine.encode_text(["a cat", prompt])
    assert str(found.value) == str(expected.value)


def test_clips_share_one_base(exported: Exported, tmp_path: Path) -> None:
    folder = repository.export(write_other(exported, tmp_path), exported.repository, name="other")
    base = OnnxBase.open(exported.base, threads=2)
    engines = OnnxEngine.open(exported.version / "clips" / "first", base), OnnxEngine.open(folder, base)
    text = engines[0].encode_text(["a cat"])
    noises = [engine.predict(engine.inverted_latents, 301, text) for engine in engines]
    truths = [
        open_checkpoint(path).predict(engines[0].inverted_latents, 301, text)
        for path in (exported.checkpoint, tmp_path / "other")
    ]
    assert (truths[0] - truths[1]).abs().max() > 1e-2
    for noise, truth in zip(noises, truths, strict=True):
        torch.testing.assert_close(noise, truth, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["base/*/unet.onnx", "base/*/unet.onnx.data", "base/*/tokenizer.json", "clips/first/values.safetensors"]
)
def test_altered_file_is_refused(copied: Path, name: str) -> None:
    (path,) = copied.glob(f"tune_a_video_stream/1/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name} is missing or altered"):
        open_clip(copied, "first")


def test_clip_of_another_base_is_refused(exported: Exported, engine: OnnxEngine, tmp_path: Path) -> None:
    elsewhere = replace(engine.base, folder=tmp_path / "0123456789abcdef-4x64x64")
    with pytest.raises(InputError, match="belongs to base"):
        OnnxEngine.open(exported.version / "clips" / "first", elsewhere)


def test_unknown_clip_names_those_there(exported: Exported) -> None:
    with pytest.raises(InputError, match="first"):
        open_clip(exported.repository, "nobody")


def test_engine_needs_no_model_library() -> None:
    """A server opens clips in seconds, and without diffusers and transformers."""
    script = "import sys, tav_opt.engines.onnxruntime; print(*{'diffusers', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not run.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen on this system")
def test_no_thread_runs_where_the_process_may_not(exported: Exported) -> None:
    """onnxruntime by itself pins a thread to each core of the machine, whatever was allowed."""
    graph = next((exported.repository / "tune_a_video_stream" / "1" / "base").glob("*/text_encoder.onnx"))
    script = (
        "import os, sys, torch; from pathlib import Path; from tav_opt.engines.onnxruntime import session\n"
        "opened = session(Path(sys.argv[1]), torch.device('cpu'))\n"
        "print({core for task in os.listdir('/proc/self/task') for core in os.sched_getaffinity(int(task))})"
    )
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(core), sys.executable, "-c", script, str(graph)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{{{core}}}"
