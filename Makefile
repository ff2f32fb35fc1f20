# Everything happens in .venv; PYTHON names the interpreter it is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
# --no-compile: Python compiles what is imported, which is a small part of what is installed.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 TRITON_DEFAULT_FP_FUSION=1

.PHONY: demo docs test test-full lint server gpu-wheels clean

demo: .venv/server
	$(OFFLINE) $(BIN)/tav-opt demo

# build/site/index.html, which opens from the disk; a link, anchor or picture that leads nowhere is an error.
docs: .venv/installed
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Three at a time on two cores, with one thread each: the first keeps a core busy for minutes, the second waits for servers
# and what they do, the third is all the rest. What they all need is made once, in COMMON.
COMPUTING := $(addprefix tests/test_,engines.py kernels.py schedules.py gateway.py demo.py fuzz.py half_graph.py \
  whole_edit.py kernels_backward.py kernels_backward_compiled.py gpu_run.py presets.py solvers.py group_norm.py \
  group_norm_interpreted.py single_file.py additions.py personalise.py refined_inversion.py suite_run.py conditions.py \
  controlled_edit.py long_clips.py added_graphs.py)
WAITING := $(addprefix tests/test_,docs.py supervision.py faults.py load.py serving.py serving_files.py operating.py \
  app_browser.py api.py api_jobs.py api_fuzz.py)
COMMON := $(CURDIR)/.venv/common
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 TAV_OPT_TESTS_COMMON=$(COMMON) $(BIN)/python -m pytest
.PHONY: test-computing test-waiting test-others
test: lint .venv/server .venv/tensorrt
	@rm -rf $(COMMON) && mkdir $(COMMON)
	@$(MAKE) --jobs 3 --keep-going --output-sync=target test-computing test-waiting test-others
test-computing:
	@$(PYTEST) -m "not full" $(COMPUTING)
test-waiting:
	@$(PYTEST) -m "not full" $(WAITING)
test-others:
	@$(PYTEST) -m "not full" $(addprefix --ignore ,$(COMPUTING) $(WAITING))

test-full: lint .venv/server .venv/tensorrt
	$(OFFLINE) $(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive setup.py tav_opt benchmarks serving 2>.venv/bandit.log \
	  || { cat .venv/bandit.log; exit 1; }
	$(BIN)/python -m benchmarks.audit constraints.txt

.venv/installed: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[api,app,cpu,dev,docs,lora,metrics,notebook,trace]'
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
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/triton-numpy numpy==1.26.4
	@$(BIN)/python -m tav_opt.serving.host.server || true
	touch $@

# What benchmarks/gpu/run.py --wheels brings to a machine that has PyTorch and transformers alone, and no network; and the
# pictures of the demo's world, which npm fetches.
WHEELS := diffusers importlib-metadata zipp tyro docstring-parser typeguard
gpu-wheels: .venv/installed
	$(BIN)/pip download --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --only-binary=:all: \
	  --python-version 3.12 --dest gpu-wheels $(WHEELS)
	-$(BIN)/python benchmarks/gpu/sprites.py gpu-wheels/sprites.zip

clean:
	rm -rf .venv demo-out gpu-wheels build dist *.egg-info
