"""Export to TensorRT: real engines of TensorRT for RTX, and what is refused before they are built."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import onnx
import onnx.reference
import pytest
import torch
from diffusers import UNet2DConditionModel
from exported import FRAMES, Exported, export_once, half_unet, untuned_graph

from tav_opt.config import InputError
from tav_opt.engines import tensorrt, tensorrt_library
from tav_opt.export import graphs, half, layers, parity
from tav_opt.export.__main__ import main
from tav_opt.export.rounding import rounded
from tav_opt.export.tensorrt import build, builder, estimate
from tav_opt.files import read_json, sha256
from tav_opt.repository.layout import info_of

pytest.importorskip("polygraphy")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def rtx() -> tensorrt_library.Library:
    pytest.importorskip("tensorrt_rtx")
    return tensorrt_library.load("tensorrt-rtx")


@pytest.fixture(scope="module")
def unet(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_unet(exported, tmp_path_factory.mktemp("half"))


def run(exported: Exported, repository: Path, *arguments: str) -> int:
    return main([str(exported.checkpoint), "--repository", str(repository), "--name", "first", *arguments])


def folders(repository: Path) -> list[Path]:
    return [path for path in repository.glob("*/1/base/*/engines/*") if path.is_dir()]


@pytest.fixture(scope="module")
def copied(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one's own, to put engines into."""
    return Path(shutil.copytree(exported.repository, tmp_path_factory.mktemp("engines") / "repository"))


@pytest.fixture(scope="module")
def engines(exported: Exported, copied: Path, rtx: tensorrt_library.Library) -> Path:
    """The small model's engines for sm89, beside those for sm120."""
    assert run(exported, copied, "--target", "tensorrt-rtx", "--arch", "sm89", "sm120") == 0
    built = {folder.name.split("-")[-2]: folder for folder in folders(copied)}
    assert {card: len(list(folder.glob("*.engine"))) for card, folder in built.items()} == {"sm89": 5, "sm120": 5}
    return built["sm89"]


def test_engines_are_named_and_described(
    engines: Path, rtx: tensorrt_library.Library, exported: Exported, unet: Path
) -> None:
    graph = half.fixed(unet, 2, "standard").graph
    manifest = json.loads((engines / "manifest.json").read_text())
    assert engines.name == f"tensorrt-rtx-{rtx.version}-sm89-{manifest['contract_hash'][:12]}"
    assert manifest["files"] == {path.name: sha256(path) for path in engines.glob("*.engine")}
    assert set(manifest["files"]) == {
        "text_encoder-1.engine", "vae_encoder-4.engine", "unet-1.engine", "unet-2.engine", "vae_decoder-4.engine",
    }  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in engines.glob("*.engine"))
    taken = manifest["contract"]["engines"]["unet-2.engine"]
    assert [(t["name"], t["shape"]) for t in taken] == [
        (t.name, [axis.dim_value for axis in t.type.tensor_type.shape.dim]) for t in (*graph.input, *graph.output)
    ]
    assert taken[0] == {"name": "latents", "shape": [2, 4, FRAMES, 8, 8], "dtype": "float32"}
    assert {tensor["dtype"] for tensor in taken[3:-1]} == {"float16"}
    for name, found in manifest["parity_of_graphs"].items():
        assert 0 < found["onnxruntime"] <= parity.HALF_TOLERANCES[name].error
    assert manifest["made_of"] == json.loads((exported.base / "manifest.json").read_text())["files"]
    assert len([path for path in engines.parent.iterdir() if path.is_dir()]) == 2


def test_what_engines_work_in_is_counted_before_they_are_opened(
    engines: Path, rtx: tensorrt_library.Library, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which a server makes room; engines of a build before have their files' sizes alone."""
    monkeypatch.setattr(tensorrt, "_fitting", lambda *_: (rtx, "sm89"))
    clip, described = info_of(exported.version / "clips" / "first"), read_json(engines / "manifest.json")
    files = sum(path.stat().st_size for path in engines.glob("*.engine"))
    assert described["needs"] > 0
    for needs, needed in ({}, files), ({"needs": 2 * files}, 2 * files):
        described.pop("needs", None)
        monkeypatch.setattr(tensorrt.layout, "manifest", lambda *_, needs=needs: described | needs)
        monkeypatch.setattr(tensorrt, "find", lambda *_: engines)
        assert tensorrt.needed_bytes(engines.parents[1], clip, torch.device("cuda")) == needed


def test_engines_that_are_there_are_left(
    exported: Exported, engines: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a killed build left beside them goes."""
    monkeypatch.setattr(builder, "build", lambda *_, **__: pytest.fail("built again"))
    killed = engines.parent / ".work-killed"
    killed.mkdir()
    (killed / "unet.half.onnx").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in engines.iterdir()}
    assert run(exported, copied, "--target", "tensorrt-rtx", "--arch", "sm89") == 0
    assert not killed.exists()
    assert {path: path.stat().st_mtime_ns for path in engines.iterdir()} == before


def test_engines_of_other_cards_and_versions_are_refused(engines: Path, rtx: tensorrt_library.Library) -> None:
    manifest = json.loads((engines / "manifest.json").read_text())
    tensorrt_library.check_fits(manifest, rtx, "sm89", engines)
    for changed, card, message in (
        ({}, "sm120", "card 'sm89', here it is 'sm120'"),
        ({"tensorrt": "1.0"}, "sm89", "version '1.0'"),
        ({"target": "tensorrt"}, "sm89", "target 'tensorrt'"),
    ):
        with pytest.raises(InputError, match=message):
            tensorrt_library.check_fits(manifest | changed, rtx, card, engines)


def test_an_interrupted_build_leaves_nothing(
    exported: Exported, engines: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C arrives inside the compiler's callback, after the first engine was built."""
    built = builder.build
    calls = []

    def interrupted(parsed: builder.Network, **settings: object) -> tuple[bytes, bytes]:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        calls.append(parsed)
        return built(parsed, **settings | ({"on_progress": stop} if len(calls) == 2 else {}))  # type: ignore[arg-type]

    monkeypatch.setattr(builder, "build", interrupted)
    assert run(exported, copied, "--target", "tensorrt-rtx", "--arch", "sm86") == 130
    assert len(calls) == 2
    assert len(folders(copied)) == 2


def test_a_graph_over_its_tolerance_is_not_built(
    exported: Exported, engines: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = {name: parity.Tolerance(error=1e-7, reason="a test") for name in parity.HALF_TOLERANCES}
    monkeypatch.setattr(parity, "HALF_TOLERANCES", strict)
    assert run(exported, copied, "--target", "tensorrt-rtx", "--arch", "sm86", "--debug-parity") == 1
    found = capsys.readouterr()
    assert "is the first layer that departs" in found.out + found.err
    assert "text_encoder: error" in found.err and "no engine was written" in found.err
    assert len(folders(copied)) == 2


def test_an_altered_graph_is_refused(
    exported: Exported, rtx: tensorrt_library.Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    (path,) = repository.glob("*/1/base/*/unet.onnx")
    path.write_bytes(path.read_bytes() + b"\0")
    assert run(exported, repository, "--target", "tensorrt-rtx", "--arch", "sm86") == 2
    assert "unet.onnx is missing or altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "tensorrt-rtx", "--arch", "sm42"], "arch 'sm42' is unknown"),
        (["--target", "tensorrt-rtx"], "PyTorch sees no CUDA GPU"),
        (["--target", "tensorrt-rtx", "--arch", "sm89", "--refit"], "--refit"),
        (["--target", "onnx", "--arch", "sm89"], "--arch"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    arguments: list[str],
    message: str,
    exported: Exported,
    rtx: tensorrt_library.Library,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the messages miss")
    assert run(exported, tmp_path / "new", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_library_names_its_extra(target: tensorrt_library.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, target.replace("-", "_"), None)
    with pytest.raises(InputError, match=rf"pip install 'tav-opt\[{target}\]'"):
        tensorrt_library.load(target)


@pytest.mark.parametrize(
    ("card", "message"),
    [("nvidia-h100-sm90", "or give --no-plugin"), ("tesla-t4-sm75", "compiled for sm80.*: give --no-plugin")],
)
def test_a_plugin_that_cannot_be_is_said_first(card: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT proper, as if it were there on a GPU: without `tensorrt.plugin`, then with it on too old a card."""
    library = tensorrt_library.Library(target="tensorrt", trt=None, version="11.4")
    monkeypatch.setattr(tensorrt_library, "load", lambda _: library)
    monkeypatch.setattr(tensorrt_library, "present_card", lambda _: card)
    modules = {"tensorrt": None} if "sm90" in card else {"tav_opt.export.tensorrt.plugin": ModuleType("stand_in")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(InputError, match=message):
        build.plan(build.EngineConfig(target="tensorrt"))
    found = build.plan(build.EngineConfig(target="tensorrt", plugin=False))
    assert found.attention == "standard" and found.cards == (card,)


def test_memory_is_counted_from_the_graph(unet: Path, rtx: tensorrt_library.Library) -> None:
    """The largest tensor is the scores of the widest attention, in fp32: (b f) heads n 2n."""
    need = estimate.needed(builder.parse(rtx, half.fixed(unet, 2, "standard"), unet), weights=7)
    heads, n = 4, 64
    assert need.largest == 2 * FRAMES * heads * n * 2 * n * 4
    assert need.largest < need.activations < 4 * need.largest
    assert need.total == need.activations + 7


def test_sizes_that_cannot_fit_name_the_plugin(rtx: tensorrt_library.Library) -> None:
    """512² and 24 frames: 51 GB of scores in fp32, as much as no card of sm89 has."""
    scores = 2 * 24 * 8 * 4096 * 8192 * 4
    need = estimate.Needed(weights=2 * 10**9, activations=scores * 3 // 2, largest=scores)
    with pytest.raises(InputError, match=r"73\.9 GiB \(48\.0 GiB for one tensor\).*48\.0 GiB.*plugin"):
        estimate.check_gpu(need, rtx, "sm89", "unet at 2")
    estimate.check_gpu(need, rtx, "sm120", "unet at 2")


def test_too_little_host_memory_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet.onnx.data").write_bytes(bytes(1000))
    monkeypatch.setattr(estimate, "_HOST_FACTOR", 10**12)
    with pytest.raises(InputError, match=r"about \d+\.\d GiB of memory, \d+\.\d GiB is free"):
        estimate.check_host(tmp_path / "unet.onnx.data")


def test_a_graph_that_no_parser_reads_is_one_line(unet: Path, rtx: tensorrt_library.Library) -> None:
    """RTX has no plugins: the plugin's graph fails, and the first node that failed is named."""
    with pytest.raises(builder.BuildError, match=r"first node_sparse_causal_attention: .*[Pp]lugin") as error:
        builder.parse(rtx, half.fixed(unet, 1, "plugin"), unet)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.full
def test_two_blocks_of_stable_diffusions_widths(rtx: tensorrt_library.Library, tmp_path: Path) -> None:
    """Heads of 40 and 80, text of 768, groups of 32: exported, fp16 within its tolerance, and built for two cards."""
    torch.manual_seed(0)
    image = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    graph = untuned_graph(image, (4, 2, 16, 16))
    names = set(map(graphs.input_name, graph.values or {}))
    path = half.write(graphs.write(graph, tmp_path), tmp_path / "unet.half.onnx", names)
    onnx.save(rounded(half.fixed(path, 1, "standard")), tmp_path / "unet-1.onnx")
    found = parity.measure_half(
        graph, [layers.onnxruntime_runner(tmp_path / "unet-1.onnx", "onnxruntime")], parity.feeds(graph, 1)
    )
    parity.check_half("unet", found)
    for card in ("sm89", "sm120"):
        engine, _ = builder.build(builder.parse(rtx, half.fixed(path, 1, "standard"), path), card=card)
        assert len(engine) > path.with_name("unet.half.onnx.data").stat().st_size, card


def test_an_engine_that_gives_out_every_layer_is_built(unet: Path, rtx: tensorrt_library.Library) -> None:
    """What `--debug-parity` compares on a GPU: each of the graph's tensors but constants is an output by its name."""
    model = half.fixed(unet, 1, "standard")
    parsed = builder.parse(rtx, model, unet)
    layers.mark_all(parsed, model)
    marked = {parsed.network.get_output(i).name for i in range(parsed.network.num_outputs)}
    computing = (
        "Conv",
        "MatMul",
        "Gemm",
        "Softmax",
        "InstanceNormalization",
        "LayerNormalization",
        "Sin",
        "Mul",
        "Add",
    )
    named = {name for node in model.graph.node if node.op_type in computing for name in node.output}
    assert "noise" in marked and named <= marked, sorted(named - marked)
    engine, _ = builder.build(parsed, card="sm89")
    assert all(name.encode() in engine for name in marked)


# What engines/tensorrt.py and export/builder.py use of the compiled module, by class.
USED = {
    "ICudaEngine": (
        "create_execution_context device_memory_size_v2 get_tensor_name get_tensor_shape get_tensor_dtype "
        "get_tensor_mode num_io_tensors"
    ),
    "IExecutionContext": "set_tensor_address execute_async_v3",
    "Runtime": "deserialize_cuda_engine",
    "Refitter": "set_named_weights refit_cuda_engine get_missing_weights",
    "Builder": "create_network create_builder_config build_serialized_network",
    "IBuilderConfig": "create_timing_cache set_timing_cache get_timing_cache progress_monitor set_flag",
    "INetworkDefinition": "mark_weights_refittable get_layer num_layers mark_output",
    "OnnxParser": "parse num_errors get_error",
    "BuilderFlag": "REFIT_INDIVIDUAL",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "TensorIOMode": "INPUT OUTPUT",
    "DataType": "FLOAT HALF INT64",
    "LayerType": "CONSTANT",
}


def test_rtx_has_all_that_is_used(rtx: tensorrt_library.Library) -> None:
    for name, members in USED.items():
        for member in members.split():
            assert hasattr(getattr(rtx.trt, name), member), f"{name}.{member}"


def test_tensorrts_bindings_have_all_that_is_used() -> None:
    """Without its libraries the module cannot be imported; the names that it registers are strings in the file."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install --no-deps tensorrt-cu13-bindings")
    content = (Path(spec.submodule_search_locations[0]) / "tensorrt.so").read_bytes()
    for name, members in USED.items():
        for text in (name, *members.split()):
            assert text.encode() + b"\0" in content, f"{name}: {text}"  # linkers share the ends of strings
