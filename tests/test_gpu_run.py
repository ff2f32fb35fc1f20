"""benchmarks/gpu: every stage as a dry run, a driver that no stage ends, and peers that compute what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tav_opt.config import InputError

ROOT = Path(__file__).parents[1]
ABSENT = ("av", "pydantic", "matplotlib", "tyro", "onnx", "tritonclient", "starlette", "uvicorn")
"""What a machine with a GPU may lack, and no stage may need."""
BLOCKED = f"""
import sys
from importlib import abc, metadata, util

class Absent(abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def version(name, known=metadata.version):
    if name == "tav-opt":
        raise metadata.PackageNotFoundError(name)
    return known(name)

def find_spec(name, package=None, known=util.find_spec):
    return None if name.partition(".")[0] in {ABSENT} else known(name, package)

metadata.version, util.find_spec = version, find_spec
sys.meta_path.insert(0, Absent())
"""
"""Neither are they there, nor is the package installed: what lies in the checkout is imported."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The run's own modules, as its processes import them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    import peers
    import predict
    import run
    import stages

    return SimpleNamespace(run=run, stages=stages, peers=peers, Shape=predict.Shape)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def of(stage: str, folder: Path) -> list[dict[str, Any]]:
    """A stage's rows without the first, of the machine."""
    found = [row for row in rows(folder) if row["stage"] == stage]
    assert found[0]["row"] == "machine" and found[0]["figures"]["dry"]
    return found[1:]


# The whole of it.


def test_a_dry_run_of_all_stages(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """In one process of the driver, on a machine that lacks what machines with GPUs lack."""
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    command = [sys.executable, "benchmarks/gpu/run.py", "--dry", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", "import av"], env=environment, capture_output=True).returncode == 1
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    demo = {"demo128-text2image.png", "demo128-vae.png", "demo128.zip"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == demo | {"log.txt", "results.jsonl", "tiles.json"}
    found = {
        stage: of(stage, tmp_path / "out") for stage in dict.fromkeys(row["stage"] for row in rows(tmp_path / "out"))
    }
    assert list(found) == [stage.name for stage in gpu.stages.STAGES], "all of them, in the table's order"
    for stage in gpu.stages.STAGES:
        assert f"{stage.name}: done; {1 + len(found[stage.name])} rows" in done.stdout
        assert not [row for row in found[stage.name] if "fault" in row]
        for goal in stage.goals:
            if goal.row.startswith("f 24"):  # at shapes that a processor takes long for
                continue
            (row,) = (row for row in found[stage.name] if row["row"] == goal.row)
            assert goal.figure in row["figures"], f"{stage.name}: nothing for {goal.row}, {goal.figure}"
            assert row["goals"][goal.figure] == {"goal": str(goal), "met": None}, "a dry run meets no goal"
    launched = {row["row"] for row in found["smoke"]}
    for name in ("sparse-causal attention", "temporal attention", "group norm"):
        assert {name, f"{name}, backward"} <= launched
    assert [row["figures"]["said"] for row in found["sanitizer"]] == [f"launched {len(launched)}"]
    timed = {row["row"]: row["figures"] for row in found["attention"] if "figures" in row}
    for name in ("ours", "FlexAttention", "two calls and a merge", "concatenation + SDPA", "temporal, ours"):
        assert "ms" in timed[f"f 4, n 128: {name}"], f"{name} was right and is timed"
    assert {"exact: eager", "fast: compiled + CUDA graph", "draft: channels-last"} <= {
        row["row"] for row in found["edit"]
    }
    ladder = ["eager", "channels-last", "+ GroupNorm kernel", "+ transposed upsampling"]
    assert [row["row"] for row in found["step"]][1:5] == ladder
    norms = {row["row"]: row["figures"] for row in found["groupnorm"]}
    assert norms["c 32, 8²: ours"]["error"] == 0, "the naive twin, which a processor takes"
    assert norms["the norms of a guided step"].keys() == {"ours, ms", "PyTorch's, ms", "× PyTorch's"}
    assert {"× PyTorch's", "ms"} <= norms["c 64, 8², forward and backward: ours"].keys()
    tiles = {row["row"]: row["figures"] for row in found["autotune"] if "figures" in row}
    kernels = {f"{kernel}, n 40, width 16" for kernel in ("forward", "query_gradients", "key_gradients")}
    assert tiles.keys() == kernels | {"the backward, down to n 40, width 16"}
    assert tiles["the backward, down to n 40, width 16"].keys() == {"faster", "triton, ms", "flash, ms"}
    tuning = {row["row"]: row["figures"] for row in found["tuning"]}
    assert tuning["gradients against the naive twins'"].keys() == {"error", "frames"}
    assert tuning["500 steps in a row"]["steps"] == 3, "of a dry run"
    assert tuning["the best of ours"]["taken"] == "extrapolated from 2 steps"
    with zipfile.ZipFile(tmp_path / "out" / "demo128.zip") as model:
        assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(model.namelist())
    assert {row["left_out"] for row in found["tests"] if "left_out" in row} == {"Skipped: needs a CUDA GPU"}


# The driver.


def outcome(gpu: SimpleNamespace, out: Path, name: str, seconds: int = 60) -> Any:
    stage = gpu.stages.Stage(name=name, where=f"gpu_stages:{name}", seconds=seconds, says="")
    return gpu.run.run(stage, out, None, dry=True)


def test_no_stage_ends_the_run(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    names = ("raises", "dies", "hangs", "at_fault", "fine")
    made = [
        gpu.stages.Stage(name=name, where=f"gpu_stages:{name}", seconds=8 if name == "hangs" else 60, says="")
        for name in names
    ]
    monkeypatch.setattr(gpu.run, "STAGES", tuple(made))
    assert gpu.run.main(["--dry", "--out", str(tmp_path)]) == 1
    last = dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines()[-len(names) :])
    assert list(last) == list(names), "one line a stage"
    assert "FAILED, the stage itself: RuntimeError: the compiler; 3 rows" in last["raises"]
    assert "FAILED, killed by SIGSEGV" in last["dies"] and "2 rows" in last["dies"]
    assert "FAILED, ended at its limit of 8 s; 3 rows" in last["hangs"]
    assert "FAILED, ours: it is wrong too; 4 rows" in last["at_fault"]
    assert last["fine"].startswith("done; 2 rows")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines if not line.endswith("half")]
    assert len(kept) == len(lines) - 1, "half a row spoils no other"
    for name in ("raises", "dies", "hangs"):
        assert {"stage": name, "row": "before", "figures": {"ms": 1.0}} in kept
    assert "RuntimeError: the compiler" in (tmp_path / "log.txt").read_text()
    (child,) = (row["figures"]["pid"] for row in kept if row["row"] == "child")
    assert gone(child), "what a stage started ends with it"


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process has ended, or will at once; one that nobody waited for has too."""
    until = time.monotonic() + seconds
    status = Path(f"/proc/{pid}/status")
    while time.monotonic() < until:
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return False


def test_a_stage_without_fault_fails_nothing(gpu: SimpleNamespace, tmp_path: Path) -> None:
    found = outcome(gpu, tmp_path, "fine")
    assert (found.why, found.rows) == ("", 2)


def test_a_test_that_fails_on_the_card_is_a_fault_and_stops_no_other(gpu: SimpleNamespace, tmp_path: Path) -> None:
    found = outcome(gpu, tmp_path, "tests_that_fail")
    # Where pytest takes its root to be, and so what stands before a file's name, depends on where both folders lie.
    by_name = {row["row"].rpartition("/")[2]: row for row in of("tests_that_fail", tmp_path)}
    assert "No module named 'nothing_here'" in by_name["test_a_gpu.py"]["fault"]
    assert by_name["test_b_gpu.py::test_wrong"]["fault"] == "call failed: AssertionError: by this much"
    assert by_name["test_b_gpu.py::test_absent"]["left_out"] == "Skipped: no card"
    assert by_name["test_b_gpu.py::test_right"]["figures"]["seconds"] < 1
    assert by_name["all"]["figures"] == {"passed": 1, "files": 2}
    assert "and 1 more" in found.why


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smok"], "stage 'smok' is not smoke, tests,"),
        ([], "no stage: give one or more of smoke,"),
        (["step", "edit"], r"step \d+ \+ edit \d+ = \d+ s, over the 560 s of one call: take fewer stages"),
        (["smoke"], "no --out: give the folder"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_start(gpu: SimpleNamespace, arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        gpu.run.main(arguments)


def test_each_stage_fits_a_call_and_names_what_is_there(gpu: SimpleNamespace) -> None:
    import importlib

    assert all(stage.seconds <= gpu.stages.BUDGET_SECONDS for stage in gpu.stages.STAGES)
    assert gpu.run.main(["--list"]) == 0
    for stage in gpu.stages.STAGES:
        assert f"| {stage.name} | {stage.seconds} | " in gpu.run.listing()
        module, function = stage.where.split(":")
        if module != "kernel_tests":  # which is named as pytest's own files are not
            assert callable(getattr(importlib.import_module(module), function))


def test_without_a_gpu_a_stage_says_so(gpu: SimpleNamespace, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = gpu.run.run(gpu.stages.STAGES[0], tmp_path, None, dry=False)
    assert "PyTorch sees no CUDA GPU here" in found.why


def test_golden_data_may_lie_elsewhere(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable reaches the tests' process, whose fixtures read it."""
    monkeypatch.setenv("TAV_OPT_TESTS_SHARED", str(tmp_path))
    environment = gpu.run._environment(gpu.stages.STAGES[1], None, dry=False)
    code = "import conftest; print(conftest.SHARED)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path), done.stderr


def test_wheels_are_there_to_import_from(gpu: SimpleNamespace, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lacking-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking/__init__.py", "answer = 42")
    with gpu.run.unpacked(tmp_path) as folder:
        environment = gpu.run._environment(gpu.stages.STAGES[0], folder, dry=False)
        code = "import lacking, tav_opt, common; print(lacking.answer)"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "42", done.stderr
    assert not folder.exists()
    (tmp_path / "compiled-1-cp312-cp312-manylinux_2_28_x86_64.whl").touch()
    with pytest.raises(InputError, match=r"compiled-1.* is no pure-Python wheel"), gpu.run.unpacked(tmp_path):
        pass
    with pytest.raises(InputError, match="holds no wheels: `make gpu-wheels`"), gpu.run.unpacked(tmp_path / "none"):
        pass


def test_goals_are_judged(gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from report import Report

    goals = (gpu.stages.Goal(row="a", figure="ms", at_most=110), gpu.stages.Goal(row="a", figure="×", at_least=1.5))
    stage = gpu.stages.Stage(name="step", where="", seconds=1, says="", goals=goals)
    report = Report(stage, tmp_path / "results.jsonl", dry=False)
    report.figures("a", {"ms": 110.0, "×": 1.49})
    report.figures("b", {"ms": float("nan")})
    first, second = rows(tmp_path)
    assert first["goals"] == {"ms": {"goal": "≤ 110", "met": True}, "×": {"goal": "≥ 1.5", "met": False}}
    assert second == {"stage": "step", "row": "b", "figures": {"ms": "nan"}}
    assert "× 1.49 (goal ≥ 1.5: NOT met)" in capsys.readouterr().out


# Tuning.


def test_a_way_to_tune_that_fails_is_its_row_and_keeps_no_model(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tuning_speed
    from report import Report

    made, begun = [], tuning_speed.Run.begun

    def one_at_a_time(*arguments: Any, **options: Any) -> Any:
        assert not any(unet() for unet in made), "the model before is still there"
        run = begun(*arguments, **options)
        made.append(weakref.ref(run.sd.unet))
        return run

    def too_little(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(tuning_speed.Run, "begun", one_at_a_time)
    monkeypatch.setattr(tuning_speed, "denoising_loss", too_little)
    real = tuning_speed.train_step
    monkeypatch.setattr(tuning_speed, "train_step", lambda *given: (too_little if len(made) == 2 else real)(*given))
    monkeypatch.setattr(tuning_speed, "WAYS", (tuning_speed.WAYS[0], tuning_speed.WAYS[2]))
    (stage,) = (stage for stage in gpu.stages.STAGES if stage.name == "tuning")
    tuning_speed.tuning_speed(Report(stage, tmp_path / "results.jsonl", dry=True))
    compared, eager, checkpointed, whole, best = rows(tmp_path)
    assert compared["fault"] == eager["fault"] == "OutOfMemoryError: CUDA out of memory"
    assert checkpointed["figures"]["steps"] == 2 and best["figures"]["by"] == checkpointed["row"]
    assert whole["figures"]["by"] == checkpointed["row"] and len(made) == 4


def test_500_steps_that_would_not_end_in_time_are_extrapolated(gpu: SimpleNamespace, tmp_path: Path) -> None:
    import tuning_speed
    from report import RESERVE, Report

    stage = gpu.stages.Stage(name="tuning", where="", seconds=RESERVE + 100, says="")
    report = Report(stage, tmp_path / "results.jsonl", dry=False)
    assert 99 < report.left() <= 100
    assert tuning_speed._whole(report, tuning_speed.WAYS[0], 101.0) is None
    (row,) = rows(tmp_path)
    assert row["left_out"].startswith("some 101 s, and ") and row["row"] == "500 steps in a row"


# The peers.


def test_a_wrong_peer_is_left_out_and_wrong_kernels_are_a_fault(gpu: SimpleNamespace, tmp_path: Path) -> None:
    import attention
    from report import Report

    report = Report(gpu.stages.STAGES[3], tmp_path / "results.jsonl", dry=True)
    shape = attention.DRY[1]
    qkv = gpu.peers.inputs(shape, report.device, report.dtype)
    right = lambda: gpu.peers.concatenated(*qkv, shape)  # noqa: E731
    assert attention._peer(report, "right", right, qkv, shape) is not None
    assert attention._peer(report, "wrong", lambda: 1.01 * right(), qkv, shape) is None
    assert attention._peer(report, "NaN", lambda: right() * float("nan"), qkv, shape) is None
    assert attention._peer(report, "refuses", lambda: 1 / 0, qkv, shape) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "sparse_causal_attention", lambda q, *_: q)
        assert attention._one_shape(report, shape) is None
    kinds = {
        row["row"]: next(kind for kind in ("figures", "left_out", "fault") if kind in row) for row in rows(tmp_path)
    }
    assert [kinds[name] for name in ("right", "wrong", "NaN", "refuses")] == ["figures", *["left_out"] * 3]
    assert kinds["f 3, n 36: ours"] == "fault" and report.faults == 1


@pytest.mark.parametrize(("frames", "n"), [(1, 128), (2, 128), (5, 256)])
def test_blocks_of_flex_attention_are_those_that_its_mask_allows(gpu: SimpleNamespace, frames: int, n: int) -> None:
    """The blocks alone decide once it is compiled, the mask alone where it is not."""
    shape = gpu.Shape(b=1, frames=frames, n=n, heads=1, width=16)
    found = gpu.peers.flex_blocks(shape, torch.device("cpu"))
    blocks = torch.arange(frames * n // 128)
    allowed = found.mask_mod(None, None, blocks[:, None] * 128, blocks[None, :] * 128)
    assert torch.equal(found.to_dense()[0, 0].bool(), allowed)
    assert found.full_kv_num_blocks.sum() == allowed.sum(), "none is read twice"


@pytest.mark.parametrize("library", ["_flash", "_cudnn"])
def test_two_calls_of_a_library_fit_together(gpu: SimpleNamespace, library: str) -> None:
    """By PyTorch's own account of the shapes that its operators for GPUs give."""
    shape = gpu.Shape(b=2, frames=5, n=64, heads=3, width=40)
    qkv = gpu.peers.inputs(shape, torch.device("meta"), torch.float16)
    assert gpu.peers.merged(*qkv, shape, getattr(gpu.peers, library)).shape == qkv[0].shape


# The model.


@pytest.fixture(scope="module")
def sd15() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import sd15

        return sd15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_is_made_in_its_dtype_and_the_same_each_time(sd15: ModuleType, dtype: torch.dtype) -> None:
    first, second = (sd15.stable_diffusion(torch.device("cpu"), dtype, small=True) for _ in range(2))
    for part in ("unet", "vae", "text_encoder"):
        values, others = (dict(getattr(model, part).named_parameters()) for model in (first, second))
        assert {value.dtype for value in values.values()} == {dtype}
        assert all(torch.equal(value, others[name]) and value.isfinite().all() for name, value in values.items())
    outs = [value for name, value in first.unet.named_parameters() if name.endswith("attn_temp.to_out.0.weight")]
    assert outs and all(value.std() > 0.01 for value in outs), "temporal attention counts"
    assert torch.get_default_dtype() == torch.float32


def test_the_architecture_is_that_of_stable_diffusion_1_5(sd15: ModuleType) -> None:
    """Parameters as the published model has them; nothing is allocated."""
    made = sd15.parts(torch.device("meta"), torch.float16)
    count = {part: sum(p.numel() for p in getattr(made, part).parameters()) for part in ("unet", "vae", "text_encoder")}
    assert count == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def test_goals_of_attention_name_rows_and_peers_that_a_card_has(gpu: SimpleNamespace) -> None:
    import attention
    from predict import SD15

    (stage,) = (stage for stage in gpu.stages.STAGES if stage.name == "attention")
    figures = {f"× concatenation + {name}" for name in gpu.peers.BACKENDS} | {"× the best peer"}
    assert {goal.row for goal in stage.goals} <= {f"{attention.title(shape)}: ours" for shape in SD15}
    assert {goal.figure for goal in stage.goals} <= figures


# What is not there.


def test_tuning_is_imported_without_what_reads_videos_draws_and_checks_files() -> None:
    code = BLOCKED + "import tav_opt.tuning, tav_opt.engines.pytorch, tav_opt.editing; print(tav_opt.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "0+uninstalled", done.stderr


def test_sprites_travel_as_they_are(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """In their order too: by it combinations are kept from training."""
    import sprites

    from tav_opt.demo import subjects

    known = {name: pictures * 2 for name, pictures in subjects.shapes().items()}
    sprites.pack(known, tmp_path / "sprites.zip")
    found = sprites.unpack(tmp_path / "sprites.zip")
    assert list(found) == list(known)
    assert all(
        a.mode == b.mode and a.tobytes() == b.tobytes()
        for name in known
        for a, b in zip(found[name], known[name], strict=True)
    )
