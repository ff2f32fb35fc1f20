"""Runs inside the Python backend of NVIDIA Triton Inference Server."""

from tav_opt.serving.catalogue import TritonPythonModel

__all__ = ["TritonPythonModel"]
