"""Where tritonserver is on this machine, and what it needs to run: its libraries and the Python backend."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tav_opt.config import InputError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, kw_only=True)
class Installation:
    """A tritonserver that can be started."""

    binary: Path
    package: Path | None = None
    """`pytriton/tritonserver` of the nvidia-pytriton wheel, whose backend is in parts; None: one installed as NVIDIA's
    container has it, complete."""
    numpy: Path | None = None
    """A folder with numpy 1: the wheel's Python backend reads numpy 2's arrays wrongly (tensors arrive empty or with
    one byte repeated), so the process that it starts gets a numpy of its own."""
    libpython: Path | None = None
    """Of the running interpreter, where the system's loader does not find it by itself."""


def find_tritonserver(path: Path | None = None) -> Installation:
    """The tritonserver at `path`, else the one in $PATH, else the one in the nvidia-pytriton wheel.

    Raises InputError that says in one line what the system lacks.
    """
    if path is not None:
        if not (path.is_file() and os.access(path, os.X_OK)):
            raise InputError(f"--tritonserver {path} is not a program")
        return Installation(binary=path)
    if found := shutil.which("tritonserver"):
        return Installation(binary=Path(found).absolute())
    return _in_wheel()


def _in_wheel() -> Installation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise InputError("there is no tritonserver for this platform: use --tritonserver, or serve on Linux x86-64")
        raise InputError("tritonserver is not installed: make server (or pip install --no-deps nvidia-pytriton)")
    package = Path(spec.submodule_search_locations[0]) / "tritonserver"
    if not (package / "python_backend_stubs" / PYTHON).is_dir():
        raise InputError(f"the nvidia-pytriton wheel has no backend for Python {PYTHON}; it has 3.8 to 3.13")
    return Installation(
        binary=package / "bin" / "tritonserver", package=package, numpy=_numpy(), libpython=_libpython()
    )


def _numpy() -> Path | None:
    if int(metadata.version("numpy").split(".")[0]) < 2:
        return None
    folder = Path(sys.prefix) / "triton-numpy"
    if not (folder / "numpy").is_dir():
        raise InputError(f"tritonserver needs a numpy 1: make server (or pip install --target {folder} 'numpy<2')")
    return folder


def _libpython() -> Path | None:
    name = f"libpython{PYTHON}.so.1.0"
    own = Path(sysconfig.get_config_var("LIBDIR") or "/nonexistent") / name
    if own.is_file():
        return own
    if ctypes.util.find_library(f"python{PYTHON}") is None:
        raise InputError(f"{name} is missing, which tritonserver's Python backend needs: apt install libpython{PYTHON}")
    return None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a tritonserver."""

    command: list[str]
    environment: dict[str, str]
    cwd: Path


def compose(found: Installation, folder: Path) -> Launch:
    """Puts together in `folder` what the server needs, the wheel's Python backend from its parts.

    The Python backend's own process ignores PYTHONPATH. It takes its packages from the working directory first, then
    from the environment of the `python3` that $PATH names.
    """
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    packages = [Path(__file__).parents[2]]
    if found.numpy is not None:
        packages += found.numpy.glob("numpy*")
    cwd = _links(folder / "packages", packages)
    if found.package is None:
        return Launch(command=[str(found.binary)], environment=environment, cwd=cwd)
    stub = found.package / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    backend = _links(folder / "backends" / "python", [*(found.package / "backends" / "python").iterdir(), stub])
    # A folder of its own: the interpreter's library folder may hold others that tritonserver must not take.
    libpython = _links(folder / "lib", [found.libpython] if found.libpython else [])
    search = [found.package.parents[1] / "nvidia_pytriton.libs", libpython, environment.get("LD_LIBRARY_PATH")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(str(path) for path in search if path)
    options = [f"--backend-directory={backend.parent}", f"--cache-directory={found.package / 'caches'}"]
    return Launch(command=[str(found.binary), *options], environment=environment, cwd=cwd)


def _links(folder: Path, targets: list[Path]) -> Path:
    folder.mkdir(parents=True)
    for target in targets:
        (folder / target.name).symlink_to(target)
    return folder
