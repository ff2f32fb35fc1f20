"""The engines of an exported base: fp16 graphs, checked against eager PyTorch, compiled for named cards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto

from tav_opt.checkpoint import VALUES, load_tensors
from tav_opt.config import Additions, InputError, OnProgress, PathLike
from tav_opt.contract import VERSION
from tav_opt.engines import tensorrt, tensorrt_library
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.engines.tensorrt import TensorRtGraphs
from tav_opt.engines.tensorrt_library import Contract, Library, Target
from tav_opt.export import graphs, half, layers, parity, whole_edit
from tav_opt.export.additions import Further, lend
from tav_opt.export.graphs import Graph
from tav_opt.export.rounding import rounded
from tav_opt.export.tensorrt import added_engines, builder, estimate
from tav_opt.files import read_json, whole, write_json
from tav_opt.repository import specs
from tav_opt.repository.layout import ENGINES, MANIFEST, base_of, check_unaltered, hashes, locked
from tav_opt.repository.specs import TensorSpec

GPU = torch.device("cuda")

Say = Callable[[str], object]
"""Called with a line of what was found: parity, memory."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engines are built, and how."""

    target: Target
    cards: tuple[str, ...] = ()
    """Architectures (sm89) to build for; none: the GPU of this machine."""
    plugin: bool = True
    """Our kernel inside the engine; TensorRT for RTX takes none."""
    refit: bool = False
    """A clip's values as constants that are refitted, not as inputs."""
    debug_parity: bool = False
    """Name the first layer that departs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config that was found possible here."""

    config: EngineConfig
    library: Library
    cards: tuple[str, ...]

    @property
    def attention(self) -> half.Attention:
        return "plugin" if self.config.plugin and self.library.target == "tensorrt" else "standard"

    def runs_here(self, card: str) -> bool:
        """Whether engines for a card can be run, and so compared, on this machine."""
        return torch.cuda.is_available() and tensorrt_library.present_card(self.library) == card


def plan(config: EngineConfig) -> Plan:
    """What a config comes to on this machine.

    Raises InputError for a missing library, an unknown architecture, and where a GPU is needed and there is none.
    """
    library = tensorrt_library.load(config.target)
    if config.refit and not torch.cuda.is_available():
        raise InputError("--refit: both compilers ask a GPU for refittable engines, and PyTorch sees none")
    if not config.cards:
        found = Plan(config=config, library=library, cards=(tensorrt_library.present_card(library),))
        if found.attention == "plugin":
            _check_plugin(found.cards[0])
        return found
    if config.target == "tensorrt":
        raise InputError(f"--arch {' '.join(config.cards)}: tensorrt builds for this machine's GPU only")
    for card in config.cards:
        builder.check_card(library, card, tensorrt_library.supported_cards(library))
    return Plan(config=config, library=library, cards=tuple(dict.fromkeys(config.cards)))


def _check_plugin(card: str) -> None:
    """Raises InputError where the plugin cannot be registered, or its kernel not be compiled for the card."""
    try:
        from tav_opt.export.tensorrt import plugin as tensorrt_plugin  # noqa: F401 (registers it)
        from tav_opt.kernels.aot import ARCHITECTURES
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the plugin needs triton and TensorRT 10.9 or newer: pip install 'tav-opt[tensorrt]', or give --no-plugin "
            f"({error})"
        ) from None
    if _architecture(card) not in ARCHITECTURES:
        known = ", ".join(f"sm{architecture}" for architecture in ARCHITECTURES)
        raise InputError(f"{card}: the plugin's kernel is compiled for {known}: give --no-plugin")


def _architecture(card: str) -> int:
    return int(card.rsplit("sm", 1)[-1])


def export(
    plan: Plan,
    clip: Path,
    *,
    base: PathLike | Additions | None = None,
    further: Iterable[Further] = (),
    say: Say = lambda line: None,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Builds the engines of an exported clip's base, for every card, and returns their folders.

    `clip` is `clips/<name>` of a model repository, `base` where its base model is now. Folders that are there already
    are left as they are. Of the graphs that were added to the base, those of the UNet get engines, and those of
    `further`, but where a clip's values are refitted. Raises InputError for what does not fit, ParityError for a graph
    or engine over its tolerance, BuildError; nothing half-built is left.
    """
    exported = base_of(clip)
    check_unaltered(exported)
    with locked(exported / ENGINES):
        _remove_leftovers(exported / ENGINES)
        with tempfile.TemporaryDirectory(dir=exported / ENGINES, prefix=".work-") as work:
            maker = _Maker(plan, exported, clip, Path(work), say, on_progress)
            traced = cache(lambda: graphs.of_clip(clip, base))
            _export_own(maker, traced)
            if not plan.config.refit:
                added_engines.export(maker, traced, [*further])
            return [maker.folder(card) for card in plan.cards]


def _export_own(maker: _Maker, traced: added_engines.Traced) -> None:
    missing = {card: folder for card in maker.plan.cards if not (folder := maker.folder(card)).exists()}
    if missing:
        estimate.check_host(maker.exported / "unet.onnx.data")
        needs = {card: sum(maker.check_memory([card], maker.rows).values()) for card in missing}
        eager, found = traced()
        modules = {graph.name: graph for graph in found}
        parities = maker.check_graphs(modules)
        for card, folder in missing.items():
            maker.make(card, folder, eager, modules, parities, needs[card])


class _Maker:
    """One export's work: the fp16 graphs in a folder that goes away, and what is made of them."""

    def __init__(
        self, plan: Plan, exported: Path, clip: Path, work: Path, say: Say, on_progress: OnProgress | None
    ) -> None:
        self.plan, self.exported, self.clip, self.work = plan, exported, clip, work
        self.say, self.on_progress = say, on_progress
        self.manifest = read_json(exported / MANIFEST)
        own, added = specs.read(exported), specs.added(exported)
        self.specs = own | added
        self.rows = rows_of(self.manifest["latents"][1])
        self.rows_of_added = {name: added_engines.rows_of(spec, self.rows) for name, spec in added.items()}
        self.halves: dict[str, Path] = {}
        self.contract = self._contract()

    def _contract(self) -> Contract:
        engines = {
            tensorrt_library.engine_file(name, rows): self.tensors(name, rows)
            for name, all_rows in self.rows.items()
            for rows in all_rows
        }
        return Contract(
            base=self.exported.name,
            attention="plugin" if self.plan.attention == "plugin" else "standard",
            values="refit" if self.plan.config.refit else "inputs",
            engines=engines,
        )

    def tensors(self, name: str, rows: int) -> tuple[TensorSpec, ...]:
        """What an engine takes and gives: as the fp32 graph, but a clip's values change their type, or go inside."""
        spec = self.specs[name]
        values = [] if self.plan.config.refit else [replace(x, dtype="float16") for x in spec.values.values()]
        return tuple(replace(x, shape=x.fixed(rows)) for x in (*spec.inputs, *values, *spec.outputs))

    def _value_names(self, name: str) -> dict[str, str]:
        """A graph's inputs for a clip's values, by parameter."""
        return {parameter: value.name for parameter, value in self.specs[name].values.items()}

    def graph(self, name: str) -> Path:
        """The fp16 graph of a name, written when first asked for."""
        if name not in self.halves:
            source, values = self.exported / self.specs[name].file, set(self._value_names(name).values())
            self.halves[name] = half.write(source, self.work / f"{name}.half.onnx", values)
        return self.halves[name]

    def model(self, name: str, rows: int, attention: half.Attention | None = None) -> ModelProto:
        """The graph as an engine of `rows` takes it."""
        model = half.fixed(self.graph(name), rows, attention or self.plan.attention)
        if self.plan.config.refit and attention is None:
            half.bake(model, self._values(name))
        return model

    def _values(self, name: str) -> list[onnx.TensorProto]:
        values = load_tensors(self.clip / VALUES)
        return [
            onnx.numpy_helper.from_array(values[parameter].half().numpy(), given)
            for parameter, given in self._value_names(name).items()
        ]

    def folder(self, card: str) -> Path:
        """Where the engines for a card are, or will be."""
        return self.exported / ENGINES / tensorrt_library.folder_name(self.plan.library, card, self.contract)

    def parsed(self, name: str, rows: int, card: str) -> builder.Network:
        """The graph in the vendor's hands; the plugin is compiled for the card."""
        if self.plan.attention == "plugin":
            from tav_opt.export.tensorrt import plugin as tensorrt_plugin

            tensorrt_plugin.for_architecture(_architecture(card))
        return builder.parse(self.plan.library, self.model(name, rows), self.graph(name))

    def check_memory(self, cards: Iterable[str], rows_of: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Says what the largest engines need, and raises InputError where a card cannot have it; bytes by graph."""
        found = {}
        for card in cards:
            for name, all_rows in rows_of.items():
                rows = max(all_rows)
                weights = Path(f"{self.graph(name)}.data").stat().st_size
                need = estimate.needed(self.parsed(name, rows, card), weights)
                self.say(f"{name} at {rows} for {card}: up to {need.total / 2**20:,.0f} MiB of GPU memory")
                estimate.check_gpu(need, self.plan.library, card, f"{name} at {rows}")
                found[name] = len(all_rows) * need.total
        return found

    def check_graphs(self, modules: dict[str, Graph]) -> dict[str, dict[str, float]]:
        """Every fp16 graph in onnxruntime against eager PyTorch; raises ParityError. Errors by graph and runtime."""
        found: dict[str, dict[str, float]] = {}
        for name, graph in modules.items():
            rows = max((self.rows | self.rows_of_added)[name])
            path = self.work / f"{name}-{rows}.onnx"
            onnx.save(rounded(self.model(name, rows, self._comparable)), path)
            if self.plan.config.debug_parity:
                self.say(self._first_departure(graph, rows, layers.marked_runner(path, self.work)))
            runner = layers.onnxruntime_runner(path, "onnxruntime")
            found[name] = self._checked(graph, runner, parity.feeds(graph, rows))
        return found

    @property
    def _comparable(self) -> half.Attention:
        """onnxruntime's attention that is like the engine's: it keeps scores in fp32, as the plugin does."""
        return "onnxruntime" if self.plan.attention == "plugin" else "standard"

    def _checked(self, graph: Graph, runner: layers.Runner, fed: list[dict[str, np.ndarray]]) -> dict[str, float]:
        results = parity.measure_half(graph, [runner], fed)
        for runtime, result in results.items():
            self.say(f"{graph.name}: fp16 error {result.error:.1e} in {runtime} (≤ {result.tolerance.error:.0e})")
        parity.check_half(graph.name, results)
        return {runtime: result.error for runtime, result in results.items()}

    def _reference(self, name: str, rows: int) -> layers.Runner:
        """The fp32 graph in onnxruntime, every tensor an output."""
        path = self.work / f"{name}-fp32.onnx"
        source = self.exported / self.specs[name].file
        onnx.save(half.fixed(source, rows, self._comparable), path)
        for data in self.exported.glob("*.onnx.data"):  # where the copy looks for its weights
            if not (self.work / data.name).exists():
                lend(data, self.work)
        return layers.marked_runner(path, self.work)

    def _first_departure(self, graph: Graph, rows: int, runner: layers.Runner) -> str:
        """Compares every layer with the fp32 graph's."""
        (feed,) = parity.feeds(graph, rows, count=1, own=self.plan.config.refit)
        found = layers.by_layer(self._reference(graph.name, rows), runner, feed)
        departure = parity.first_departure(found, parity.tolerance_of(graph, half=True).error)
        return f"{graph.name} at {rows} in {runner.name}: {departure}"

    def _debug_engine(self, name: str, rows: int, card: str) -> layers.Runner:
        """An engine that gives out every layer; what it gives out it cannot fuse, so it is another than is written."""
        parsed = self.parsed(name, rows, card)
        layers.mark_all(parsed, self.model(name, rows))
        path = self.work / f"debug-{tensorrt_library.engine_file(name, rows)}"
        path.write_bytes(builder.build(parsed)[0])
        return layers.tensorrt_runner(self.plan.library, path)

    def make(
        self,
        card: str,
        folder: Path,
        eager: TorchEngine,
        modules: dict[str, Graph],
        parities: dict[str, dict[str, float]],
        needs: int,
    ) -> None:
        """Builds every engine for a card, and compares each, and a whole edit by all, where they run.

        The folder has its name when all are good.
        """
        with whole(folder) as temporary:
            temporary.mkdir()
            compared = {}
            for name, all_rows in self.rows.items():
                for rows in all_rows:
                    file = temporary / tensorrt_library.engine_file(name, rows)
                    file.write_bytes(self.built(name, rows, card))
                    if self.plan.runs_here(card):
                        compared[file.name] = self.compared(modules[name], rows, card, file)
            manifest = self._engines_manifest(card, temporary, parities, compared) | {"needs": needs}
            write_json(temporary / MANIFEST, manifest)  # by which they are opened
            write_json(temporary / MANIFEST, manifest | {"edit": self._whole_edit(card, temporary, eager)})

    def _whole_edit(self, card: str, engines: Path, eager: TorchEngine) -> dict[str, object]:
        """What the manifest says of a guided edit by the engines; raises ParityError."""
        if not self.plan.runs_here(card):
            return whole_edit.not_run(f"{card} is not the GPU of the machine that built them")
        library = self.plan.library
        runnable = partial(
            TensorRtGraphs, self.exported, library, card, GPU, tensorrt.deserializer(library), engines=engines
        )
        engine = ExportedEngine.open(self.clip, ExportedBase.open(self.exported, "tensorrt", runnable))
        found = whole_edit.check(engine, eager, whole_edit.HALF)
        self.say(f"a whole edit: {found.psnr:.1f} dB against eager PyTorch (≥ {found.least:g} dB)")
        return found.to_json()

    def compared(self, graph: Graph, rows: int, card: str, engine: Path) -> dict[str, float]:
        """An engine on its card against eager PyTorch; raises ParityError."""
        if self.plan.config.debug_parity:
            self.say(self._first_departure(graph, rows, self._debug_engine(graph.name, rows, card)))
        fed = parity.feeds(graph, rows, own=self.plan.config.refit)
        return self._checked(graph, layers.tensorrt_runner(self.plan.library, engine), fed)

    def built(self, name: str, rows: int, card: str) -> bytes:
        cache = self.exported.parents[1] / "timing" / f"{self.plan.library.target}-{self.plan.library.version}-{card}"
        engine, timing = builder.build(
            self.parsed(name, rows, card),
            card=card if self.plan.config.cards else None,
            refit=list(self._value_names(name).values()) if self.plan.config.refit else (),
            timing_cache=cache.read_bytes() if cache.is_file() else b"",
            on_progress=self._progress(f"{name} at {rows} for {card}"),
        )
        if timing:
            with whole(cache) as temporary:
                temporary.write_bytes(timing)
        return engine

    def _progress(self, what: str) -> OnProgress | None:
        told = self.on_progress
        return None if told is None else lambda phase, step, steps: told(f"{what}: {phase}", step, steps)

    def _engines_manifest(
        self,
        card: str,
        folder: Path,
        parities: dict[str, dict[str, float]],
        compared: dict[str, dict[str, float]],
    ) -> dict[str, object]:
        return {
            "version": VERSION,
            "target": self.plan.library.target,
            "tensorrt": self.plan.library.version,
            "card": card,
            "contract": asdict(self.contract),
            "contract_hash": self.contract.hash,
            "islands": [*half.STATISTICS, *half.SINUSOID],
            "parity_of_graphs": parities,
            "parity_of_engines": compared,  # empty where they were built for another card than this machine's
            "made_of": self.manifest["files"],
            "files": hashes(folder),
        }


def rows_of(frames: int) -> dict[str, tuple[int, ...]]:
    """How long the first axis of each engine is: b = 1 and 2 for the UNet, a batch of frames for the VAE."""
    frames_at_once = min(frames, TensorRtGraphs.frames_at_once)
    return {
        "text_encoder": (1,),
        "vae_encoder": (frames_at_once,),
        "unet": (1, 2),
        "vae_decoder": (frames_at_once,),
    }


def _remove_leftovers(engines: Path) -> None:
    """Removes what a killed build left: hidden folders beside the engines."""
    for path in engines.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
