#!/usr/bin/env bash
# An arm64 Python and an arm64 bivlm-device under qemu give the answers, token for token, that this
# machine gives: 20 questions of easy-vqa to an exported model, with the aarch64 wheels of
# onnxruntime and numpy and the cross-built operator library.
# bash tests/arm64/run.sh MODEL.onnx [folder to work in]
#
# For Debian 12 on x86 with g++-aarch64-linux-gnu and qemu-user-static, in the environment of
# tests/run.sh (Python 3.11). Fetches about 60 MB and installs nothing outside its folder.
set -euo pipefail
tree=$(realpath "$(dirname "$0")/../..")
model=$(realpath "${1:?usage: bash tests/arm64/run.sh MODEL.onnx [folder to work in]}")
work=$(realpath -m "${2:-$tree/build/arm64}")
cd "$tree"
root=$work/root
count=20

if [[ ! -x $root/usr/bin/python3.11 ]]; then
  apt=(-qq -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oAPT::Sandbox::User=root
    "-oDir::State::Lists=$work/lists" "-oDir::Cache=$work/cache")
  mkdir -p "$work"/{debs,lists/partial,cache/archives/partial} "$root"
  apt-get "${apt[@]}" update
  (cd "$work/debs" && apt-get "${apt[@]}" download python3.11-minimal libpython3.11-minimal \
    libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 \
    liblzma5 libsqlite3-0 libuuid1 \
    libjpeg62-turbo{,-dev} libpng16-16 libpng-dev zlib1g-dev libpcre2-8-0 libpcre2-dev \
    libutf8proc{2,-dev} nlohmann-json3-dev)
  for package in "$work"/debs/*.deb; do dpkg -x "$package" "$root"; done
fi

# qemu shows the files of the host, in which the CPU library of onnxruntime finds no ARM core, and
# crashes; files of the root, of a Cortex-A53, take their place.
mkdir -p "$root/proc" "$root/sys/devices/system/cpu"
printf '%s\t: %s\n' processor 0 Features 'fp asimd crc32' \
  'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x0 'CPU part' 0xd03 \
  'CPU revision' 4 >"$root/proc/cpuinfo"
echo 0 | tee "$root/sys/devices/system/cpu/"{possible,present} >/dev/null

if [[ ! -d $work/site ]]; then
  wheels=()
  for name in numpy onnxruntime pillow tokenizers jinja2 markupsafe; do
    wheels+=("$name==$(python -c "from importlib import metadata; print(metadata.version('$name'))")")
  done
  pip install -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --abi cp311 --abi abi3 --abi none --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 --platform any --target "$work/site" "${wheels[@]}"
fi
BIVLM_BUILD_OPS=0 pip install -q --no-deps --upgrade --target "$work/package" .

# The operator library, and bivlm-device with the libraries of the root.
cmake -S custom_ops -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  --toolchain "$tree/custom_ops/cmake/aarch64.toolchain.cmake" -DBIVLM_BUILD_TOOLS=ON \
  "-DCMAKE_FIND_ROOT_PATH=$root" -DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY \
  -DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY \
  "-DCMAKE_CXX_FLAGS=-isystem $root/usr/include/aarch64-linux-gnu" \
  "-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,$root/lib/aarch64-linux-gnu" >/dev/null
cmake --build "$work/build" | tail -n 1
library=$work/build/libbivlm_custom_ops.so
onnxruntime=$(echo "$work"/site/onnxruntime/capi/libonnxruntime.so.*)

python -P tests/arm64/answers.py "$model" "$count" >"$work/here.jsonl"
for cpu in cortex-a53 cortex-a76 max; do
  emulator=(qemu-aarch64-static -cpu "$cpu" -L "$root")
  PYTHONPATH=$work/package:$work/site BIVLM_OPS_LIBRARY=$library "${emulator[@]}" \
    "$root/usr/bin/python3.11" -P tests/arm64/answers.py "$model" "$count" >"$work/python.jsonl"
  python -P tests/arm64/answers.py "$model" "$count" "${emulator[@]}" "$work/build/bivlm-device" \
    --onnxruntime "$onnxruntime" --library "$library" >"$work/device.jsonl"
  for program in python device; do
    cmp "$work/here.jsonl" "$work/$program.jsonl"
    echo "$cpu: $program gives the same $(wc -l <"$work/$program.jsonl") answers"
  done
done
