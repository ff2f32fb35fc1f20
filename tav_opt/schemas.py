"""What the JSON files of checkpoints and repositories may say: kinds, ranges and forms, looked at as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tav_opt.config import Fit, InputError

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]
"""A SHA-256; parts of it are parts of paths."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\z")]
"""Of a file beside, never of one elsewhere."""
Files = dict[FileName, Hash]
Text = Annotated[str, StringConstraints(max_length=100_000)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Side = Annotated[int, Field(ge=1, le=2**14)]


class _Checked(BaseModel):
    """Nothing is converted; entries of other versions may stand beside."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Files(_Checked):
    files: Files


class Manifest(_Checked):
    """Of whatever folder."""

    files: Files = {}
    added: Mapping[FileName, _Files] = {}
    """Graphs that came to a base later, with the files that came with them."""


Place = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
"""A path, or a hub id."""


class _Additions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    single_files: Place | None = Field(default=None, alias="model_config")
    loras: list[Place] = []
    embeddings: list[Place] = []
    vae: Place | None = None


Pixels = Annotated[int, Field(ge=1, le=2**16)]


class ClipDescription(Manifest):
    """Of a checkpoint, and of an exported clip."""

    base: Place
    additions: _Additions = _Additions()
    base_hash: Hash
    prompt: Text
    frames: Count
    height: Side
    width: Side
    fps: Annotated[float, Field(ge=0.001, le=1000)]
    inversion_steps: Annotated[int, Field(ge=1, le=1000)]
    inversion_iterations: Annotated[int, Field(ge=0, le=100)] = 0
    window: Annotated[int, Field(ge=2)] | None = None
    source_height: Pixels | None = None
    source_width: Pixels | None = None
    fit: Fit = "crop"
    settings: dict[str, Any] = {}


class _Tensor(_Checked):
    name: FileName
    shape: list[Annotated[int, Field(ge=1)] | FileName]
    dtype: Literal["float16", "float32", "int64"]


class _Graph(_Checked):
    name: FileName
    inputs: list[_Tensor]
    outputs: list[_Tensor]
    values: dict[Text, _Tensor]


class _Added(_Files):
    graph: _Graph


class BaseManifest(Manifest):
    """Of an exported base."""

    version: int
    base_hash: Hash
    latents: Annotated[list[Count], Field(min_length=4, max_length=4)]
    tokens: Count
    scaling_factor: float
    scheduler: dict[str, Any]
    graphs: list[_Graph] | None = None
    values: dict[Text, FileName] = {}
    files: Files
    added: Mapping[FileName, _Added] = {}


class _Made(_Files):
    """Of a graph that came to a base later, in another form than ONNX."""

    made_of: Files
    needs: Annotated[int, Field(ge=0)] = 0


class _Machine(_Checked):
    features: list[Text] = []


class ProgramsManifest(Manifest):
    """Of compiled programs, and of an fp16 graph."""

    made_of: Files
    machine: _Machine = _Machine()
    files: Files
    added: Mapping[FileName, _Made] = {}


class _Contract(_Checked):
    values: Text
    attention: Text


class EnginesManifest(Manifest):
    """Of TensorRT's engines."""

    version: int
    made_of: Files
    contract: _Contract
    contract_hash: Text
    files: Files
    needs: Annotated[int, Field(ge=0)] = 0
    added: Mapping[FileName, _Made] = {}


def check(kind: type[BaseModel], value: Any, where: object) -> None:
    """Raises InputError, naming the first entry that is not as `kind` has it."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"] if not str(part).endswith("[key]"))
        given = "" if first["type"] == "missing" else f" {str(first['input'])[:60]!r}"
        raise InputError(f"{where}: {name[:120]}{given}: {first['msg']}") from None
