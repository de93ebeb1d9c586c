#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, without a registry: its Python holds what is needed.
#
#   scripts/gpu_check.sh [stage ...]     stages: build wheel test sanitize decode steps kernels; all of them without arguments
#
# Results go to $OUT (default: benchmarks/results), named after the GPU. A failed stage does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build wheel test sanitize decode steps kernels)
export PYTHONPATH="$PWD:$PWD/python" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
# CUDA kernels for the GPU that is here alone, which is all that the checks need.
CLLM_CUDA_ARCHS=${CLLM_CUDA_ARCHS:-$("$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")}
export CLLM_CUDA_ARCHS
gpu=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '_'))") || exit 1
failed=()

stage() {
  echo "== $1"
  case $1 in
    build) "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -c "from cllm_kernels.cli import main; main()" doctor ;;
    wheel)  # as users install it, from nothing but what is here
      rm -rf build/gpu_site \
        && "$PYTHON" -m pip install -q --no-deps --no-build-isolation --no-index --target build/gpu_site . \
        && (cd build/gpu_site && PYTHONPATH=. "$PYTHON" -c "import torch; from cllm_kernels import backends as b
assert 'gpu_site' in b.__file__ and b.resolve('auto', torch.device('cuda', 0)) == b.GPU_ORDER[0], b.available()") ;;
    test)
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops/test_ops_on_gpu.py tests/ops/test_cuda_on_gpu.py \
        tests/decoding/test_decoding_on_gpu.py ;;
    sanitize)
      local tool=compute-sanitizer
      command -v $tool > /dev/null || { echo "not run: there is no $tool in PATH"; return 0; }
      for check in memcheck racecheck synccheck; do
        $tool --tool $check --error-exitcode 9 "$PYTHON" -m pytest -q -x -p no:cacheprovider \
          tests/ops/test_cuda_on_gpu.py -k "head_sizes and bfloat16 or later_rows and bfloat16 or streams or graphs" || return 1
      done ;;
    decode)  # the bundled models: real tokens per forward and per second
      "$PYTHON" -c "from cllm_kernels.cli import main; main()" bench --device cuda --prompts 16 --batch 1 --batch 8 \
        --block-size 16 --block-size 32 --json "$OUT/decode_$gpu.json" ;;
    steps)  # 7B and 8B shapes with random weights: time of a step
      "$PYTHON" benchmarks/steps.py --shape llama-2-7b --shape qwen2.5-7b --shape llama-3-8b --dtype bfloat16 \
        --device cuda --width 1 --width 8 --width 16 --width 32 --width 64 --length 1024 --length 8192 --length 32768 \
        --repeats 20 --json "$OUT/steps_$gpu.json" ;;
    kernels)
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks --benchmark-only --benchmark-json="$OUT/kernels_$gpu.json" \
        && "$PYTHON" benchmarks/plot.py "$OUT/kernels_$gpu.json" \
        && CLLM_BACKEND=triton "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_kernels.py \
          -k "not lm_head" --benchmark-only --benchmark-json="$OUT/kernels_${gpu}_triton.json" ;;
    *) echo "no such stage: $1; there are build, wheel, test, sanitize, decode, steps and kernels"; return 1 ;;
  esac
}

for name in "${stages[@]}"; do
  begin=$SECONDS
  stage "$name" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
  echo "== $name took $((SECONDS - begin)) s"
done
# All results as one file, with what failed.
"$PYTHON" - "$OUT" "$gpu" "${failed[@]}" <<'END'
import json, pathlib, sys
folder, gpu, failed = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
parts = {name: folder / f"{name}_{gpu}.json" for name in ("kernels", "decode", "steps")}
rows = {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
(folder / f"{gpu}.json").write_text(json.dumps({"gpu": gpu, "failed": failed} | rows) + "\n")
END
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
