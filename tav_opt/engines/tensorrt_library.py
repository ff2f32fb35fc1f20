"""TensorRT and TensorRT for RTX: two Python modules of one API, and what an engine built by either is named by."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tav_opt.config import InputError
from tav_opt.repository.specs import TensorSpec

Target = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True, kw_only=True)
class Library:
    """One of the two modules."""

    target: Target
    trt: Any
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        return self.target == "tensorrt-rtx"


def load(target: Target) -> Library:
    """Imports the vendor's module; raises InputError, naming the extra that installs it, where it cannot be."""
    try:
        trt = importlib.import_module(target.replace("-", "_"))
        return Library(target=target, trt=trt, version=trt.__version__)
    except (
        ImportError,
        OSError,
        AttributeError,
        RuntimeError,
    ) as error:  # the wheel without its libraries: any of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{target} cannot be used: pip install 'tav-opt[{target}]' ({reason})") from None


def supported_cards(library: Library) -> list[str]:
    """The architectures that TensorRT for RTX builds for on any machine: sm75, sm86, …"""
    return sorted(name.lower() for name in library.trt.ComputeCapability.__members__ if name.startswith("SM"))


def present_card(library: Library, device: torch.device | None = None) -> str:
    """What the engines of this machine's GPU are named by: its architecture for RTX, else its full name too.

    Raises InputError where there is no GPU.
    """
    if device is not None and device.type != "cuda":
        raise InputError(f"{library.target} runs on CUDA GPUs")
    if not torch.cuda.is_available():
        hint = "" if library.builds_without_gpu else "; tensorrt-rtx builds for named cards without one"
        raise InputError(f"{library.target}: PyTorch sees no CUDA GPU{hint}")
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"sm{major}{minor}"
    if library.builds_without_gpu:
        return architecture
    return f"{re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name(device).lower()).strip('-')}-{architecture}"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a set of engines takes and gives, and how its attention is made: equal contracts are interchangeable."""

    base: str
    attention: Literal["plugin", "standard"]
    values: Literal["inputs", "refit"]
    engines: dict[str, tuple[TensorSpec, ...]]
    """Inputs, then the outputs, by engine file."""

    @property
    def hash(self) -> str:
        return digest(asdict(self))


def digest(contract: dict[str, Any]) -> str:
    """SHA-256 of a contract as it stands in a manifest."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()


def folder_name(library: Library, card: str, contract: Contract) -> str:
    """`<target>-<version>-<card>-<contract>`: the engines of anything else have another name."""
    return f"{library.target}-{library.version}-{card}-{contract.hash[:12]}"


def engine_file(name: str, rows: int) -> str:
    """The file of one engine, whose first axis is so long."""
    return f"{name}-{rows}.engine"


def check_fits(manifest: dict[str, Any], library: Library, card: str, folder: Path) -> None:
    """Raises InputError, with the reason, for engines of another TensorRT, version or card."""
    for what, found, here in (
        ("target", manifest.get("target"), library.target),
        ("TensorRT version", manifest.get("tensorrt"), library.version),
        ("card", manifest.get("card"), card),
    ):
        if found != here:
            raise InputError(
                f"{folder}: its engines were built for {what} {found!r}, here it is {here!r}: export again with "
                f"--target {library.target}"
            )
