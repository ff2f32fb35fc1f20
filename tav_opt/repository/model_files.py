"""The files of the served models beside the exported clips: their configuration, from the contract, and model.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tav_opt.config import WorkerConfig, check_numbers, with_absolute_paths
from tav_opt.contract import (
    CLIPS_INPUTS,
    CLIPS_MODEL,
    CLIPS_OUTPUTS,
    STREAM_INPUTS,
    STREAM_MODEL,
    STREAM_OUTPUTS,
    UNARY_INPUTS,
    UNARY_MODEL,
    UNARY_OUTPUTS,
    ServedTensor,
)
from tav_opt.files import whole
from tav_opt.repository.layout import version_folder

MODEL_PY = '''"""Runs inside the Python backend of NVIDIA Triton Inference Server."""

from tav_opt.serving.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_HEAD = """# Generated from tav_opt/served_tensors.py by tav_opt/repository/model_files.py.
name: "{name}"
backend: "python"
max_batch_size: 0
"""


def stream_config(config: WorkerConfig = WorkerConfig(), gpus: Sequence[int] = ()) -> str:  # noqa: B008 — frozen
    """The configuration of the streaming model: decoupled; edits that no instance has in hand wait in Triton's queue.

    Its instances are on these GPUs, else on every one, or on the processor where there is none.
    """
    return f"""{_HEAD.format(name=STREAM_MODEL)}model_transaction_policy {{ decoupled: true }}
{_tensors(STREAM_INPUTS, STREAM_OUTPUTS)}
instance_group [{{ {_place(gpus)}, count: {config.instances} }}]
{_queue(config)}
{_parameters(config)}
"""


def unary_config(config: WorkerConfig = WorkerConfig()) -> str:  # noqa: B008 — frozen
    """The configuration of the unary model, which passes one request at a time on to the streaming one."""
    return f"""{_HEAD.format(name=UNARY_MODEL)}{_tensors(UNARY_INPUTS, UNARY_OUTPUTS)}
instance_group [{{ kind: KIND_CPU, count: 1 }}]
{_queue(config)}
{_parameters(config)}
"""


def clips_config() -> str:
    """The configuration of the clips' model, which has nothing to set."""
    return f"""{_HEAD.format(name=CLIPS_MODEL)}{_tensors(CLIPS_INPUTS, CLIPS_OUTPUTS)}
instance_group [{{ kind: KIND_CPU, count: 1 }}]
"""


def _place(gpus: Sequence[int]) -> str:
    return f"kind: KIND_GPU, gpus: [{', '.join(map(str, gpus))}]" if gpus else "kind: KIND_AUTO"


def _queue(config: WorkerConfig) -> str:
    return f"""dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {config.queue_size}
    timeout_action: REJECT
    default_timeout_microseconds: {round(config.queue_seconds * 1e6)}
    allow_timeout_override: true
  }}
}}"""


def _tensors(inputs: Iterable[ServedTensor], outputs: Iterable[ServedTensor]) -> str:
    lists = (",\n".join(_tensor(tensor) for tensor in tensors) for tensors in (inputs, outputs))
    return "input [\n{}\n]\noutput [\n{}\n]".format(*lists)


def _tensor(tensor: ServedTensor) -> str:
    optional = ", optional: true" if tensor.optional else ""
    shape = ", ".join(map(str, tensor.shape))
    return f'  {{ name: "{tensor.name}", data_type: TYPE_{tensor.dtype}, dims: [{shape}]{optional} }}'


def _parameters(config: WorkerConfig) -> str:
    values = {name: "" if value is None else str(value) for name, value in asdict(config).items()}
    return "\n".join(
        f'parameters {{ key: "{name}" value {{ string_value: "{_quoted(value)}" }} }}' for name, value in values.items()
    )


def read_parameters(model_config: Mapping[str, Any]) -> WorkerConfig:
    """The settings in a served model's configuration, as Triton hands it over; what is absent has its default."""
    found = {name: value["string_value"] for name, value in model_config.get("parameters", {}).items()}
    default = asdict(WorkerConfig())
    return WorkerConfig(**{name: _read(found[name], default[name]) for name in default if name in found})


def _read(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        return text == "True"
    if default is None:
        return Path(text) if text else None
    return type(default)(text)


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"")


def write_model_files(
    repository: Path,
    config: WorkerConfig = WorkerConfig(),  # noqa: B008 — frozen
    gpus: Sequence[int] = (),
) -> None:
    """Writes `config.pbtxt` and `1/model.py` of the served models into a model repository, where they differ.

    Raises InputError for settings out of range.
    """
    check_numbers(config)
    stream, unary, clips = (repository / model for model in (STREAM_MODEL, UNARY_MODEL, CLIPS_MODEL))
    for path, text in (
        (stream / "config.pbtxt", stream_config(config, gpus)),
        (stream / "1" / "model.py", MODEL_PY.format(module="worker")),
        (unary / "config.pbtxt", unary_config(config)),
        (unary / "1" / "model.py", MODEL_PY.format(module="unary")),
        (clips / "config.pbtxt", clips_config()),
        (clips / "1" / "model.py", MODEL_PY.format(module="catalogue")),
    ):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def configure(folder: Path, repository: Path, config: WorkerConfig, *, gpus: Sequence[int] = ()) -> None:
    """Makes `folder` a model repository of the bases and clips of another one, with settings of its own.

    What is exported to that one later is there, too. Raises InputError for settings out of range.
    """
    write_model_files(folder, with_absolute_paths(config), gpus)  # the worker runs in another folder
    for name in ("base", "clips"):
        (version_folder(folder) / name).symlink_to((version_folder(repository) / name).resolve())
