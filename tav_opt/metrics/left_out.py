"""A metric that has no figure, of a clip or on a machine, is left out with the reason, never in silence."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tav_opt.config import InputError, first_line


class LeftOut(InputError):
    """A metric has no figure here; the message says in one line why."""


def library(module: str, package: str, install: str = "'tav-opt[metrics]'") -> Any:
    """A module of a package that need not be installed; raises LeftOut, saying how, where it cannot be imported."""
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise LeftOut(f"needs {package}, which is not installed: pip install {install}") from None
    except Exception as error:  # torchvision of another build than torch's raises a RuntimeError
        raise LeftOut(f"needs {package}, which cannot be imported: {first_line(error)}") from None
