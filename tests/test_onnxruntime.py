"""What only the ONNX Runtime engine has; what every engine does, it too: test_engines.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import Exported, export_once

from tav_opt.config import InputError
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.engines.registry import open_clip


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def eager(exported: Exported) -> TorchEngine:
    return open_checkpoint(exported.checkpoint)


@pytest.fixture(scope="module")
def engine(exported: Exported) -> ExportedEngine:
    return open_clip(exported.repository, "first", threads=2)


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.repository, tmp_path / "repository"))


@pytest.mark.parametrize("b", [17])
def test_predict_at_any_batch(engine: ExportedEngine, eager: TorchEngine, b: int) -> None:
    generator = torch.Generator().manual_seed(b)
    latents = torch.randn((b, *engine.source_latents.shape[1:]), generator=generator)
    text = torch.randn((b, engine.base.tokens, 32), generator=generator)
    expected = eager.predict(latents, 501, text)
    torch.testing.assert_close(engine.predict(latents, 501, text), expected, atol=2e-5, rtol=0)


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
