"""One ONNX graph of fixed shapes becomes one engine, by TensorRT or TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from tav_opt.config import InputError, OnProgress
from tav_opt.engines.tensorrt_library import Library


class BuildError(Exception):
    """The vendor's parser or compiler refused a graph; the message is its own."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A parsed graph; the builder and the logger live as long as it does."""

    library: Library
    builder: Any
    network: Any
    logger: Any

    @property
    def layers(self) -> list[Any]:
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]


def _logger(library: Library) -> Any:
    """Keeps errors for the message of a BuildError; the vendor's warnings are no news to who exports."""

    class Logger(library.trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.trt.ILogger.Severity.ERROR, library.trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip().splitlines()[0])

    return Logger()


def parse(library: Library, model: ModelProto, path: Path) -> Network:
    """Reads a graph, whose weights lie beside `path`, into a strongly typed network; raises BuildError."""
    trt = library.trt
    logger = _logger(library)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString(), str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = f"{errors[0].node_name()}: {errors[0].desc()}" if errors else "; ".join(logger.errors)
        raise BuildError(f"{path.name}: {library.target} cannot read it ({len(errors)} errors), first {first}")
    return Network(library=library, builder=builder, network=network, logger=logger)


def build(
    parsed: Network,
    *,
    card: str | None = None,
    refit: Collection[str] = (),
    timing_cache: bytes = b"",
    on_progress: OnProgress | None = None,
) -> tuple[bytes, bytes]:
    """Compiles a network and returns the engine and the timing cache, which grows from build to build.

    `card` ("sm89") names an architecture instead of the present GPU; weights named in `refit` can be replaced in the
    built engine. Raises BuildError with the compiler's reason.
    """
    trt, config = parsed.library.trt, parsed.builder.create_builder_config()
    if card is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, card.upper()), 0)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        for name in refit:
            if not parsed.network.mark_weights_refittable(name):
                raise BuildError(f"{parsed.library.target} knows no weights {name!r} to refit")
    config.set_timing_cache(config.create_timing_cache(timing_cache), ignore_mismatch=False)
    monitor = _monitor(trt, on_progress)
    config.progress_monitor = monitor
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if engine is None:
        raise BuildError(f"{parsed.library.target}: {'; '.join(parsed.logger.errors) or 'the build failed'}")
    cache = config.get_timing_cache()
    return bytes(memoryview(engine)), bytes(memoryview(cache.serialize())) if cache is not None else b""


def _monitor(trt: Any, on_progress: OnProgress | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of outer phases; an exception (Ctrl-C) ends the build instead of passing through C++."""

        def __init__(self) -> None:
            super().__init__()
            self.outer: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outer[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if on_progress is not None and phase_name in self.outer:
                    on_progress(phase_name, step + 1, self.outer[phase_name])
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            self.outer.pop(phase_name, None)

    return Monitor()


def check_card(library: Library, card: str, cards: Collection[str]) -> None:
    """Raises InputError for an architecture that TensorRT for RTX does not build for, naming those it does."""
    if card not in cards:
        raise InputError(f"arch {card!r} is unknown to {library.target} {library.version}: {', '.join(sorted(cards))}")
