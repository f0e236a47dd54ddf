#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 18 minutes: the tests, then the measurements.
#   benchmarks/gpu.sh OUT            (needs: pip install -e '.[cuda12,test]' or cuda13; rivals: '.[bench]')
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT_FOLDER}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
timeout 600 python -m pytest -q -m gpu 2>&1 | tee "$out/tests.txt" | tail -n 15
timeout 480 python benchmarks/gpu_bench.py --out "$out" --seconds 400 2>&1 | tee "$out/bench.txt"
