#!/usr/bin/env bash
# Builds the CUDA library for the GPU of this machine, runs its tests there, and measures it.
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
cmake --build ../build/cuda --parallel --target "${tests[@]}" cuda_bench >/dev/null

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
