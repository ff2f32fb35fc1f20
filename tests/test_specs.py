"""What graphs take and give: listed in the base's manifest, and read from it by every runtime."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from exported import Exported, export_once
from tensorrt_stand_in import deserialize

from tav_opt.config import InputError
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.onnxruntime import Bound, session
from tav_opt.engines.tensorrt import Batched, FixedEngine
from tav_opt.export import graphs, half, parity
from tav_opt.export.graphs import Graph
from tav_opt.repository import specs
from tav_opt.repository.layout import info_of
from tav_opt.repository.specs import GraphSpec, TensorSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


def test_graphs_are_listed_as_their_files_are_and_bases_without_a_list_stay_served(
    exported: Exported, tmp_path: Path
) -> None:
    manifest = json.loads((exported.base / "manifest.json").read_text())
    listed = specs.read(exported.base)
    values = specs.value_inputs(exported.base)
    assert list(listed) == ["text_encoder", "vae_encoder", "unet", "vae_decoder"]
    assert listed == {name: specs.of_onnx(exported.base / spec.file, values) for name, spec in listed.items()}
    assert [bool(spec.values) for spec in listed.values()] == [False, False, True, False]
    before = tmp_path / exported.base.name
    shutil.copytree(exported.base, before)
    del manifest["graphs"]
    (before / "manifest.json").write_text(json.dumps(manifest | {"values": values}))
    assert specs.read(before) == listed
    clip = exported.version / "clips" / "first"
    choice = registry.Choice(engine="onnxruntime", kind=registry.kind("onnxruntime"), device=CPU)
    old, new = (
        ExportedEngine.open(clip, registry.open_base(base, info_of(clip), choice)) for base in (before, exported.base)
    )
    text = old.encode_text(["a cat"])
    assert torch.equal(old.predict(old.inverted_latents, 301, text), new.predict(new.inverted_latents, 301, text))


class Twofold(torch.nn.Module):
    """Two outputs of two shapes, the second of another length a row and with a clip's value in it."""

    def forward(self, x: torch.Tensor, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, (x[:, :, None] * values["scale.weight"]).sum(1)


def test_a_graph_with_several_outputs_runs_in_every_runtime(tmp_path: Path) -> None:
    x = TensorSpec(name="x", shape=("n", 3), dtype="float32")
    outputs = (replace(x, name="more"), replace(x, name="scaled", shape=("n", 5)))
    scale = TensorSpec(name="scale_weight", shape=(5,), dtype="float32")
    # Of a name that tolerances are there for.
    spec = GraphSpec(name="vae_decoder", inputs=(x,), outputs=outputs, values={"scale.weight": scale})
    graph = Graph(spec=spec, module=Twofold(), values={"scale.weight": torch.arange(5.0)})
    path = graphs.write(graph, tmp_path)
    assert specs.of_onnx(path, {"scale.weight": "scale_weight"}) == spec
    assert parity.check(graph, parity.in_onnxruntime(path, spec)).error < 1e-6
    with pytest.raises(parity.ParityError, match="is over its tolerance"):
        parity.check(graph, lambda given, values: graph.run(given, values) | {"scaled": torch.full((1, 5), 1e6)})
    given = torch.randn(3, 3)
    expected = {"more": given + 1, "scaled": given.sum(1, keepdim=True) * torch.full((5,), 2.0)}
    values = {"scale_weight": torch.full((5,), 2.0)}
    bound = Bound(session(path, CPU), spec, CPU, values)
    onnx.save(half.fixed(path, 2, "standard"), tmp_path / "2.engine")
    engine = FixedEngine(deserialize(tmp_path / "2.engine"), CPU, values)
    for found in (bound(x=given), Batched([engine])(x=given)):
        assert found.keys() == expected.keys()
        for name, output in found.items():
            torch.testing.assert_close(output, expected[name])


def test_an_engine_that_gets_no_memory_to_work_in_is_refused() -> None:
    """The library answers with nothing in a context's place, and would be called into later."""
    engine = SimpleNamespace(create_execution_context=lambda: None, device_memory_size_v2=3 * 2**30)
    with pytest.raises(InputError, match=r"cannot have the 3\.0 GiB that an engine works in"):
        FixedEngine(engine, CPU, {})
