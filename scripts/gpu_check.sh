#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, without a registry: its Python holds what is needed.
#
#   scripts/gpu_check.sh [stage ...]     stages: build test kernels; all of them without arguments
#
# Results go to $OUT (default: benchmarks/results), named after the GPU. A failed stage does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test kernels)
export PYTHONPATH="$PWD:$PWD/python" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
gpu=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '_'))") || exit 1
failed=()

stage() {
  echo "== $1"
  case $1 in
    build) "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -c "from cllm_kernels.cli import main; main()" doctor ;;
    test) "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_ops_on_gpu.py tests/decoding/test_decoding_on_gpu.py ;;
    kernels)
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks --benchmark-only --benchmark-json="$OUT/kernels_$gpu.json" \
        && "$PYTHON" benchmarks/plot.py "$OUT/kernels_$gpu.json" ;;
    *) echo "no such stage: $1; there are build, test and kernels"; return 1 ;;
  esac
}

for name in "${stages[@]}"; do
  begin=$SECONDS
  stage "$name" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
  echo "== $name took $((SECONDS - begin)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
