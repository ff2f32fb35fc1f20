"""Runs inside the Python backend of NVIDIA Triton Inference Server."""

from tav_opt.serving.worker import TritonPythonModel

__all__ = ["TritonPythonModel"]
