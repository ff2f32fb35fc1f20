"""On a GPU: programs compiled for it, our kernels inside, and a loop of steps in which the host waits for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    pytest.importorskip("diffusers")
    from exported import export_once

    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def programs(exported) -> Path:  # type: ignore[no-untyped-def]
    from tav_opt.export import compiled

    return compiled.export(exported.version / "clips" / "first", device=CUDA)


def test_steps_are_the_eager_ones_and_the_host_waits_for_none(exported, programs: Path) -> None:  # type: ignore[no-untyped-def]
    """Called, recorded, replayed: each like eager fp32; then a loop in which a synchronisation is an error."""
    from tav_opt.engines.pytorch import open_checkpoint
    from tav_opt.engines.registry import open_clip

    assert "-sm" in programs.name and programs.name.endswith("-fp16")
    engine = open_clip(exported.repository, "first", engine="compiled", device=CUDA)
    truth = open_checkpoint(exported.checkpoint)
    text = truth.encode_text(["", "a cat"])
    for number, timestep in enumerate((901, 501, 101, 1)):
        latents = torch.cat([truth.inverted_latents] * 2) * (1 + number)
        expected = truth.predict(latents, timestep, text)
        found = engine.predict(latents.to(CUDA), timestep, text.to(CUDA))
        torch.testing.assert_close(found.cpu(), expected, atol=2e-2, rtol=0)
    latents, text, timesteps = latents.to(CUDA), text.to(CUDA), torch.arange(901, 1, -100, device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for timestep in timesteps:
            latents = 0.9 * latents + 0.1 * engine.predict(latents, timestep, text)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.isfinite().all()


def test_no_python_of_ours_runs_inside_a_step(exported, programs: Path) -> None:  # type: ignore[no-untyped-def]
    """The kernels are in the package: where Triton is absent, the programs run."""
    script = """
import sys
sys.modules["triton"] = None
import torch
from tav_opt.engines.registry import open_clip
engine = open_clip(sys.argv[1], "first", engine="compiled", device=torch.device("cuda"))
print(engine.predict(engine.inverted_latents, 301, engine.encode_text([""])).isfinite().all().item())
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    command = [sys.executable, "-c", script, str(exported.repository)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
