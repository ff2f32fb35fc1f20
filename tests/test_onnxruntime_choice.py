"""Which onnxruntime is installed, and whether it has the GPU that is asked for. No GPU is here: stand-ins play it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FakeEngine

from tav_opt.config import InputError
from tav_opt.demo.run import DemoConfig, run
from tav_opt.engines.onnxruntime import CUDA, check_one, load_onnxruntime, session, why_not
from tav_opt.engines.registry import best_device
from tav_opt.serving.worker import device_of

CPU = "CPUExecutionProvider"
ANY = (Path("base"), FakeEngine.info)


class Runtime:
    """An onnxruntime built for some providers, of which some load."""

    __version__ = "1.31"

    def __init__(self, built: list[str], loading: list[str]) -> None:
        self.built, self.loading, self.calls = built, loading, list[str]()
        self.SessionOptions = SimpleNamespace

    def get_available_providers(self) -> list[str]:
        return self.built

    def preload_dlls(self) -> None:
        self.calls.append("preload")

    def InferenceSession(self, path: Path, options: object, providers: list) -> SimpleNamespace:
        self.calls.append("open")
        self.providers = providers
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        return SimpleNamespace(get_providers=lambda: [name for name in names if name in self.loading])


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found out about this process's real onnxruntime, before and after."""
    check_one.cache_clear()
    yield
    check_one.cache_clear()


@pytest.fixture
def told() -> list[str]:
    return []


def installed(monkeypatch: pytest.MonkeyPatch, built: list[str], loading: list[str] | None = None) -> Runtime:
    runtime = Runtime(built, built if loading is None else loading)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    return runtime


def distribution(folder: Path, name: str) -> None:
    """As pip leaves one that holds the onnxruntime folder."""
    info = folder / f"{name.replace('-', '_')}-1.31.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


@pytest.mark.parametrize("others", [["onnxruntime-gpu"], ["onnxruntime-openvino"], ["onnxruntime-gpu", "ort-nightly"]])
def test_several_distributions_of_onnxruntime_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: list[str]
) -> None:
    """They share one folder, so that either may be the one that runs."""
    for name in ("onnxruntime", *others):
        distribution(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    remedy = f"pip uninstall --yes {' '.join(sorted(['onnxruntime', *others]))}, then pip install"
    for opens in (load_onnxruntime, best_device, lambda: session(tmp_path / "x.onnx", torch.device("cpu"))):
        with pytest.raises(InputError) as caught:
            opens()
        assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_the_demo_says_what_it_lacks_before_it_tunes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytriton", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="tritonserver is not installed"):
        run(DemoConfig(out=tmp_path / "out"))
    check_one.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for in_process in (False, True):
        with pytest.raises(InputError, match="onnxruntime is not installed"):
            run(DemoConfig(out=tmp_path / "out", in_process=in_process))
    assert not (tmp_path / "out").exists() and not capsys.readouterr().out


def test_the_one_that_is_installed_here_is_taken() -> None:
    assert load_onnxruntime().get_available_providers()


def test_none_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'tav-opt\[cpu\]', or \[gpu\]"):
        load_onnxruntime()
    assert "is not installed" in str(why_not(*ANY, torch.device("cpu")))


@pytest.mark.parametrize(
    ("gpu", "built", "expected", "said"),
    [
        (True, [CUDA, CPU], "cuda", None),
        (False, [CPU], "cpu", None),
        (True, [CPU], "cuda", None),
        (False, [CUDA, CPU], "cpu", "PyTorch .* sees none"),
    ],
)
def test_half_a_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, told: list[str], gpu: bool, built: list[str], expected: str, said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    installed(monkeypatch, built)
    assert best_device(told.append).type == expected
    if said is None:
        assert not told
    else:
        (line,) = told
        assert re.search(said, line) and "edits run on the CPU" in line and "\n" not in line


def test_it_is_said_once_on_stderr_where_no_log_is(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    installed(monkeypatch, [CUDA, CPU])
    best_device()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "sees none" in record.message


def test_an_onnxruntime_for_processors_is_passed_over_on_a_gpu_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, [CPU])
    reason = str(why_not(*ANY, torch.device("cuda")))
    assert "onnxruntime is built for processors" in reason and "tav-opt[gpu]" in reason and "\n" not in reason
    installed(monkeypatch, [CUDA, CPU])
    assert why_not(*ANY, torch.device("cuda")) is None


def test_the_worker_says_it_in_the_servers_log(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Triton places an instance on a GPU that PyTorch does not see."""
    placed = {"model_instance_kind": "GPU", "model_instance_device_id": "1"}
    installed(monkeypatch, [CUDA, CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(placed, told.append) == torch.device("cuda:1") and not told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(placed, told.append) == torch.device("cpu") and len(told) == 1


def test_cuda_loads_its_libraries_before_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = installed(monkeypatch, [CUDA, CPU])
    session(Path("x.onnx"), torch.device("cuda"))
    assert runtime.calls == ["preload", "open"]
    # Each new shape would otherwise wait for trials of all of cuDNN's algorithms, the first inversion for instance.
    assert runtime.providers[0][1]["cudnn_conv_algo_search"] == "HEURISTIC"


def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime goes on without a word; CUDA's pointers would be read as the processor's."""
    installed(monkeypatch, [CUDA, CPU], loading=[CPU])
    with pytest.raises(InputError, match=r"cuda:1: onnxruntime 1.31 cannot load its CUDA libraries.*tav-opt\[gpu\]"):
        session(Path("x.onnx"), torch.device("cuda:1"))
    session(Path("x.onnx"), torch.device("cpu"))
