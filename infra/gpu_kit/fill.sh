#!/usr/bin/env bash
# Download what a bare GPU machine (Linux, Python 3.12, torch, no network) lacks for `make test-gpu` and
# `make bench-gpu`: about 25 MiB of wheels, pinned by constraints.txt. DeepSpeed's wheel needs `.venv`.
set -euo pipefail
cd "$(dirname "$0")/../.."
KIT=${1:-.kit}
LIMIT_MIB=55
RAW=$(mktemp -d)
trap 'rm -rf "$RAW"' EXIT
rm -rf "$KIT" && mkdir -p "$KIT"

get() {  # FOLDER REQUIREMENT...: download wheels for that machine
  local platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  .venv/bin/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --constraint constraints.txt --dest "$@"
}

get "$KIT" transformers trl peft datasets dill multiprocess hjson pydantic pydantic_core annotated-types typing-inspection \
  liger-kernel==0.8.5 schedulefree
# That machine cannot load nine tenths of these two: other CUDA versions, xFormers' own flash attention.
get "$RAW" bitsandbytes xformers
.venv/bin/python -m infra.gpu_kit.slim "$RAW"/bitsandbytes-*.whl "$KIT" 'libbitsandbytes_(cuda1[12]|cuda132|rocm|xpu)'
.venv/bin/python -m infra.gpu_kit.slim "$RAW"/xformers-*.whl "$KIT" 'xformers/_C\.so'
DS_BUILD_OPS=0 .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --no-binary=:all: \
  --constraint constraints.txt --wheel-dir "$KIT" deepspeed

SIZE=$(du -sm "$KIT" | cut -f1)
echo "$KIT: $(ls "$KIT" | wc -l) wheels, $SIZE MiB"
[ "$SIZE" -le "$LIMIT_MIB" ] || { echo "nightshift: $KIT is larger than $LIMIT_MIB MiB; slim it down" >&2; exit 1; }
