#!/usr/bin/env bash
# An arm64 Python under qemu gives the answers that this machine gives: 20 questions of easy-vqa to
# an exported model, with the aarch64 wheels of onnxruntime and numpy and the cross-built library.
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
    liblzma5 libsqlite3-0 libuuid1)
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

(cd custom_ops && cmake --preset arm64-qemu >/dev/null &&
  cmake --build --preset arm64-qemu --target bivlm_custom_ops | tail -n 1)

python -P tests/arm64/answers.py "$model" "$count" >"$work/here.jsonl"
for cpu in cortex-a53 cortex-a76 max; do
  PYTHONPATH=$work/package:$work/site BIVLM_OPS_LIBRARY=build/arm64-qemu/libbivlm_custom_ops.so \
    qemu-aarch64-static -cpu "$cpu" -L "$root" "$root/usr/bin/python3.11" -P \
    tests/arm64/answers.py "$model" "$count" >"$work/$cpu.jsonl"
  cmp "$work/here.jsonl" "$work/$cpu.jsonl"
  echo "$cpu: the same $(wc -l <"$work/$cpu.jsonl") answers"
done
