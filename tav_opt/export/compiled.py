"""The programs of an exported base, compiled by AOTInductor for a processor or a GPU like this machine's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_opt import checkpoint
from tav_opt.checkpoint import load_tensors
from tav_opt.config import Additions, InputError, OnProgress, PathLike
from tav_opt.contract import VERSION
from tav_opt.engines import compiled
from tav_opt.engines.compiled import WEIGHTS, own_weights
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.export import beside, graphs, parity, whole_edit
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.export.half_module import in_half
from tav_opt.export.parity import OnGraph
from tav_opt.export.whole_edit import OnEdit
from tav_opt.files import read_json, whole, write_json
from tav_opt.repository.layout import ENGINES, MANIFEST, base_of, check_unaltered, hashes, info_of, locked

MOST_ROWS = 63
"""Of one call; for more, the VAE's convolutions are other ones."""


def export(
    clip: Path,
    *,
    base: PathLike | Additions | None = None,
    further: Iterable[Further] = (),
    device: torch.device | None = None,
    on_graph: OnGraph | None = None,
    on_edit: OnEdit | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Compiles the programs of an exported clip's base for a device of this machine and returns their folder.

    The device is the GPU where PyTorch has one, in fp16, else the processor, in fp32, unless it is given. `clip` is
    `clips/<name>` of a model repository, `base` where its base model is now. Programs that are there and fit are left
    as they are. Of the graphs that were added to the base, those of the UNet get theirs, and those of `further`.
    Raises InputError where there is no C++ compiler, and ParityError for a program, or a whole edit, that departs from
    eager PyTorch: either way nothing is written.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info, exported = info_of(clip), base_of(clip)
    check_unaltered(exported)
    folder = compiled.folder_of(exported, device)
    traced = cache(lambda: graphs.of_clip(clip, base))
    with locked(exported / ENGINES):
        if compiled.why_not(exported, info, device) is not None:
            _check_compiler()
            _write_own(traced, clip, folder, device, on_graph, on_edit, on_progress)
        if lacking := beside.lacking(folder, exported, further := [*further]).makeable:
            _check_compiler()
            weights = load_tensors(folder / WEIGHTS)
            make = partial(_added, weights=weights, device=device, on_graph=on_graph)
            beside.add(folder, exported, beside.again(lacking, exported, further, *traced()), make, on_progress)
    return folder


def _write_own(
    traced: Callable[[], tuple[TorchEngine, list[Graph]]],
    clip: Path,
    folder: Path,
    device: torch.device,
    on_graph: OnGraph | None,
    on_edit: OnEdit | None,
    on_progress: OnProgress | None,
) -> None:
    """The programs of the base's own graphs, compared one by one and by a whole edit."""
    exported, (eager, own) = base_of(clip), traced()
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
    with whole(fresh) as temporary:
        temporary.mkdir()
        found = _write(own, temporary, device, on_graph)
        manifest = _manifest(exported, found, temporary, device)
        write_json(temporary / MANIFEST, manifest)  # by which it is opened
        engine = _engine(clip, exported, temporary, device)
        edit = whole_edit.check(engine, eager, _line(device), on_progress)
        if on_edit is not None:
            on_edit(compiled.TARGET, edit)
        write_json(temporary / MANIFEST, manifest | {"edit": edit.to_json()})
    shutil.rmtree(folder, ignore_errors=True)  # of another processor, or made of other graphs
    fresh.rename(folder)


def _engine(clip: Path, exported: Path, folder: Path, device: torch.device) -> ExportedEngine:
    """The clip by the programs in a folder that has no name yet."""
    open_graphs = partial(compiled.CompiledGraphs, exported, info_of(clip), device, folder=folder)
    return ExportedEngine.open(clip, ExportedBase.open(exported, "compiled", open_graphs))


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise InputError("compiling needs a C++ compiler: apt install g++") from None


def _write(
    traced: list[Graph], folder: Path, device: torch.device, on_graph: OnGraph | None
) -> dict[str, parity.Parity]:
    weights: dict[str, Tensor] = {}
    for graph in traced:
        constants = compile_program(_narrowed(graph, device), folder / f"{graph.name}.pt2")
        weights |= {f"{graph.name}.{name}": value for name, value in constants.items()}
    checkpoint.save_tensors(weights, folder / WEIGHTS)
    return {graph.name: _compared(graph, folder, weights, device, on_graph) for graph in traced}


def _compared(
    graph: Graph, folder: Path, weights: dict[str, Tensor], device: torch.device, on_graph: OnGraph | None
) -> parity.Parity:
    """How far a graph's program is from eager PyTorch; raises ParityError."""
    own = {name: value for name, value in weights.items() if name.startswith(f"{graph.name}.")}
    program = compiled.opened(folder / f"{graph.name}.pt2", graph.name, own, device)
    found = parity.check(graph, run_of(graph, program, device), half=_half(device))
    if on_graph is not None:
        on_graph(graph.name, found)
    return found


def _added(
    graph: Graph, folder: Path, *, weights: dict[str, Tensor], device: torch.device, on_graph: OnGraph | None
) -> dict[str, Any]:
    """The program of a graph that was added, and the weights that it has beside those of the base's own."""
    constants = compile_program(_narrowed(graph, device), folder / f"{graph.name}.pt2")
    shared = compiled.with_unets(graph.spec, weights)
    named = {f"{graph.name}.{name}": value for name, value in constants.items()}
    rest = {name: value for name, value in named.items() if name not in shared or not value.equal(shared[name])}
    if rest:
        checkpoint.save_tensors(rest, folder / own_weights(graph.name))
    return {"parity": _compared(graph, folder, shared | rest, device, on_graph).to_json()}


def _line(device: torch.device) -> float:
    """What a whole edit must reach, in dB."""
    return whole_edit.HALF if _half(device) else whole_edit.FULL


def _half(device: torch.device) -> bool:
    return compiled.precision_of(device) == torch.float16


def _narrowed(graph: Graph, device: torch.device) -> Graph:
    """As it is compiled for a device."""
    return in_half(graph, device) if _half(device) else graph


def run_of(graph: Graph, program: Any, device: torch.device) -> parity.Run:
    """A program, given the processor's fp32 tensors and answering with such."""
    dtype = compiled.precision_of(device)

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}

    def run(inputs: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = graph.spec.by_name(program(*moved(inputs).values(), **graph.keywords(moved(values))))
        return {name: output.to("cpu", torch.float32) for name, output in outputs.items()}

    return run


@torch.no_grad()
def compile_program(graph: Graph, path: Path) -> dict[str, Tensor]:
    """Compiles a graph, its free axes free, into a package of code → the constants that the package needs, by name."""
    import torch.fx.experimental._config as shapes
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.utils import fresh_cache

    arguments, kwargs = graph.traced()
    dynamic = graph.shapes(lambda name: torch.export.Dim(name, min=1, max=MOST_ROWS))
    # A length of 1 is as good as any other: without this, programs for 2 and more refuse it.
    with shapes.patch(backed_size_oblivious=True), graphs.quiet():  # type: ignore[attr-defined]
        module = graph.module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as `laid_out` lays weights out
        program = torch.export.export(module, arguments, kwargs, dynamic_shapes=dynamic)
    with fresh_cache(), graphs.quiet():
        aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,  # they lie beside, once
                "aot_inductor.compile_wrapper_opt_level": "O0",  # it only calls the kernels; O1 takes twice as long
            },
        )
    known = {**program.state_dict, **program.constants}
    needed = aoti_load_package(str(path)).get_constant_fqns()
    return {name: known[name].detach().cpu().contiguous().clone() for name in needed}


def _manifest(exported: Path, found: dict[str, parity.Parity], folder: Path, device: torch.device) -> dict[str, Any]:
    return {
        "version": VERSION,
        "machine": compiled.machine_of(device),
        "made_of": read_json(exported / MANIFEST)["files"],
        "parity": {name: result.to_json() for name, result in found.items()},
        "files": hashes(folder),
    }
