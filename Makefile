# Everything happens in .venv; PYTHON names the interpreter it is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 TRITON_DEFAULT_FP_FUSION=1

.PHONY: demo test test-full lint server clean

demo: .venv/server
	$(OFFLINE) $(BIN)/tav-opt demo

test: lint .venv/server .venv/tensorrt
	$(OFFLINE) $(BIN)/python -m pytest -m "not full"

test-full: lint .venv/server .venv/tensorrt
	$(OFFLINE) $(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: a plain range of it takes the newest CUDA build, several GB.
.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[cpu,dev]'
	touch $@

# TensorRT for RTX builds engines on any Linux machine; TensorRT's bindings, without its libraries, are the truth about the
# signatures of its plugins. Their tests skip where either cannot be installed.
.venv/tensorrt: .venv/installed
	-$(PIP) --editable '.[tensorrt-rtx]'
	-$(PIP) --no-deps tensorrt-cu13-bindings
	touch $@

# The server's wheel asks for numpy < 2. That is true of its Python backend, which gets one of its own, beside; its Python
# library, which would put it into our environment, is not used: hence no dependencies.
server: .venv/server
.venv/server: .venv/installed
	-$(PIP) --no-deps nvidia-pytriton
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/triton-numpy numpy==1.26.4
	@$(BIN)/python -m tav_opt.serving.server || true
	touch $@

clean:
	rm -rf .venv demo-out build dist *.egg-info
