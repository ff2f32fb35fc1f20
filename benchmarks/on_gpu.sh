#!/usr/bin/env bash
# All that waits for a GPU, within ten minutes (more where TensorRT is installed): tests of the kernels and of TensorRT,
# then attention, then latency. Every later GPU measurement joins it.
# Results: benchmarks/results/<gpu>.json, <gpu>-latency.json and the tables in <gpu>.md. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "on_gpu.sh: PyTorch sees no CUDA GPU; python benchmarks/attention.py is the dry run" >&2
    exit 2
fi
GPU=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())')
RESULTS=benchmarks/results
mkdir -p "$RESULTS"
timeout 150 "$PYTHON" -m pytest tests/test_kernels_gpu.py
timeout 240 "$PYTHON" -m pytest -rs tests/test_tensorrt_gpu.py
timeout 240 "$PYTHON" benchmarks/attention.py --out "$RESULTS/$GPU.json" | tee "$RESULTS/$GPU.md"
timeout 200 "$PYTHON" benchmarks/latency.py --preset sd15 --engines pytorch --steps 10 --calls 3 \
    --out "$RESULTS/$GPU-latency.json" | tee -a "$RESULTS/$GPU.md"
