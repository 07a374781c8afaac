#!/usr/bin/env bash
# Builds the CUDA library for the GPU of this machine, runs its tests there, and measures it: the
# kernels alone, and whole models in ONNX Runtime where the active Python has bivlm-edge with its
# tests' packages (pip install ".[dev]") and an onnxruntime with the CUDA provider.
# bash custom_ops/bench/cuda.sh [arguments of cuda_bench]
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v nvcc >/dev/null && [ -z "${CUDACXX:-}" ]; then
  echo "cuda.sh: nvcc is missing; install the CUDA toolkit, add its bin to PATH, or set CUDACXX" >&2
  exit 2
fi
# 8.7 becomes 87; a board whose nvidia-smi does not say gets all architectures.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 |
  tr -cd 0-9 || true)
cmake -S . -B ../build/cuda -DCMAKE_BUILD_TYPE=Release -DBIVLM_CUDA=ON \
  -DBIVLM_CUDA_ARCHITECTURES="$architecture" -DBIVLM_BUILD_TESTS=ON -DBIVLM_BUILD_BENCH=ON |
  sed -n 's/^-- \(CUDA library\)/\1/p'
tests=(cuda_binary_matmul_gpu_test cuda_gated_silu_gpu_test cuda_token_prune_gpu_test)
cmake --build ../build/cuda --parallel --target "${tests[@]}" cuda_bench \
  bivlm_custom_ops_cuda >/dev/null

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null ||
  echo "cuda.sh: nvidia-smi does not say which driver this is" >&2
for test in "${tests[@]}"; do
  status=0
  "../build/cuda/tests/$test" || status=$?
  if ((status == 77)); then
    echo "cuda.sh: nothing was measured" >&2
    exit 2
  fi
  ((status == 0)) || exit "$status"
done
../build/cuda/bench/cuda_bench "$@"

check='from bivlm_edge.runtime.providers import check_provider as check; check("cuda")'
if ! reason=$(python3 -P -c "import pytest; $check" 2>&1 | tail -n 1) || [ -n "$reason" ]; then
  echo "cuda.sh: nothing was run in ONNX Runtime: $reason"
  exit 0
fi
BIVLM_CUDA_OPS_LIBRARY=$(realpath ../build/cuda/libbivlm_custom_ops_cuda.so)
export BIVLM_CUDA_OPS_LIBRARY
python3 -P -m pytest -q ../tests/integration/test_gpu.py
bivlm-bench --synthetic smolvlm-256m --provider cuda
