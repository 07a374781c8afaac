#!/usr/bin/env bash
# All checks and tests, in the active environment (pip install ".[dev]" comes first).
# bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "format and lint"
ruff check -q .
ruff format -q --check .
git ls-files 'custom_ops/*.h' 'custom_ops/*.inc' 'custom_ops/*.cc' 'custom_ops/*.cu' |
  xargs -r clang-format --dry-run --Werror

step "types"  # an installed copy: mypy cannot see that export/ is bivlm_edge.export
rm -rf build/site
BIVLM_BUILD_OPS=0 pip install -q --no-deps --target build/site . 2>&1 | grep -v 'WARNING: Location' || true
(cd build/site && mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p bivlm_edge)

step "C++ kernels under ASan and UBSan"
# of what CMake says: whether the CUDA library is built, for which GPUs, or why not
(cd custom_ops && cmake --preset asan | sed -n 's/^-- \(CUDA library\)/\1/p' && cmake --build --preset asan -- -k 0 | tail -n 1 &&
  ctest --preset asan --output-on-failure -j 2)

step "NEON under qemu"
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64-static >/dev/null; then
  (cd custom_ops && cmake --preset arm64-qemu >/dev/null &&
    cmake --build --preset arm64-qemu -- -k 0 | tail -n 1 &&
    ctest --preset arm64-qemu --output-on-failure -j 2)
else
  echo "skipped: aarch64-linux-gnu-g++ or qemu-aarch64-static is missing" \
    "(apt-get install g++-aarch64-linux-gnu qemu-user-static)"
fi

step "pytest"
# Small tensors: threads of torch would only wait for each other; two processes do not.
export OMP_NUM_THREADS=1
pytest -q -n 2 --dist loadfile "$@"
