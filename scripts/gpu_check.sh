#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, without a registry: its Python holds what is needed.
#
#   scripts/gpu_check.sh [stage ...]     all of them without arguments
#
# Stages, each of which runs alone too and is stopped after its seconds, so that all take less than 9 minutes:
#   build     compiles for the GPU that is here, in place
#   wheel     installs as users do, and imports that
#   test      the GPU tests, and beside them `sanitize`
#   sanitize  the CUDA kernels under compute-sanitizer, where there is one
#   decode    the bundled CLLM in bfloat16: real tokens per forward and per second
#   steps     7B and 8B shapes with random weights: time of a step, floor, host gaps
#   compiled  the same with torch.compile, of transformers and of ours
#   kernels   the kernel benchmarks, and which of our kernels is faster where
#   report    one JSON and one readable table of what is there; runs after any stage
#
# Results go to $OUT (default: benchmarks/results): one JSON, one readable table and one log, named after the GPU, plots,
# and attention_table.json. They are written anew after every stage, so a failed or stopped one does not lose the others'.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
declare -A LIMIT=([build]=40 [wheel]=15 [test]=110 [sanitize]=40 [steps]=120 [decode]=80 [kernels]=80 [compiled]=85 [report]=5)
ORDER=(build test steps decode kernels compiled wheel)
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

steps_of() {
  local shape=$1
  shift
  "$PYTHON" benchmarks/steps.py --shape "$shape" --dtype bfloat16 --device cuda --repeats 5 "$@"
}

sanitizer() {  # looks at our kernels alone; without torch's cache, what is behind a tensor is behind its memory
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kns=cllm --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/ops/test_ops_on_gpu.py -k "cuda and ($2)"
}

many_pytest() {  # on many cores, since compiling for Triton takes most of the time; for at most $BOUND seconds, where it is set
  local cores
  cores=$(nproc)
  ${BOUND:+timeout --signal=INT "$BOUND"} "$PYTHON" -m pytest -q -p no:cacheprovider -n $((cores < 12 ? cores : 12)) --dist worksteal "$@"
}

run_stage() {
  local bad=0
  case $1 in
    build) "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -c "from cllm_kernels.cli import main; main()" doctor ;;
    wheel)
      rm -rf build/gpu_site \
        && "$PYTHON" -m pip install -q --no-deps --no-build-isolation --no-index --target build/gpu_site . \
        && (cd build/gpu_site && PYTHONPATH=. "$PYTHON" -c "import torch; from cllm_kernels import backends as b
assert 'gpu_site' in b.__file__ and b.resolve('auto', torch.device('cuda', 0)) == b.GPU_ORDER[0], b.available()") ;;
    test)  # beside each other: most of their time is the host's
      local checks
      run_stage sanitize & checks=$!
      many_pytest tests/decoding/test_decoding_on_gpu.py tests/ops/test_ops_on_gpu.py || bad=1
      wait "$checks" && return $bad ;;
    steps)
      local shape
      trap 'exit 1' INT  # or the next one would begin: typer turns an interrupt into an error
      for shape in llama-2-7b qwen2.5-7b llama-3-8b; do
        steps_of $shape --no-compiled --width 1 --width 8 --width 16 --width 32 --width 64 \
          --long-width 1 --long-width 16 --eager-width 16 --length 1024 --length 8192 --length 32768 --json "$PARTS/steps_$shape.json" || bad=1
      done
      return $bad ;;
    decode)
      "$PYTHON" -c "from cllm_kernels.cli import main; main()" bench --device cuda --dtype bfloat16 \
        --model cllm=models/spider-cllm --prompts 8 --rounds 1 --batch 1 --batch 8 --block-size 16 --no-compiled --json "$PARTS/decode.json" ;;
    kernels)
      BOUND=40 CLLM_BENCH_COMPILE_ALONE=1 many_pytest benchmarks/test_kernels.py
      "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks/test_kernels.py --benchmark-only \
        --benchmark-json="$PARTS/kernels_$GPU.json" || bad=1
      cp cllm_kernels/attention_table.json "$OUT" \
        && "$PYTHON" benchmarks/attention_table.py "$PARTS/kernels_$GPU.json" "$OUT/attention_table.json" \
        && echo "cp $OUT/attention_table.json cllm_kernels/ makes backend auto follow that" \
        && "$PYTHON" benchmarks/plot.py "$PARTS/kernels_$GPU.json" && cp "$PARTS"/*.png "$OUT" && return $bad ;;
    sanitize)
      command -v compute-sanitizer > /dev/null || { echo "not run: there is no compute-sanitizer in PATH"; return 0; }
      local checks=() id
      sanitizer memcheck "sanitized or streams" & checks+=($!)
      sanitizer racecheck sanitized & checks+=($!)
      sanitizer synccheck sanitized & checks+=($!)
      for id in "${checks[@]}"; do wait "$id" || bad=1; done
      return $bad ;;
    compiled)
      steps_of llama-2-7b --no-compiled --compiled-width 16 --width 1 --width 16 --length 1024 \
        --json "$PARTS/steps_compiled.json" || bad=1
      steps_of llama-2-7b --width 1 --length 1024 --json "$PARTS/steps_compiled_hf.json" || bad=1
      return $bad ;;
  esac
}

# This script again, as the process of one stage, which can be stopped with all that it started.
if [ -n "${CLLM_STAGE:-}" ]; then
  run_stage "$CLLM_STAGE"
  exit
fi

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=("${ORDER[@]}")
for name in "${stages[@]}"; do
  [ -n "${LIMIT[$name]:-}" ] || { echo "no such stage: $name; there are ${ORDER[*]} report"; exit 2; }
done
# CUDA kernels for the GPU that is here alone, which is all that the checks need.
read -r arch GPU < <("$PYTHON" -c "import torch
print('%d%d' % torch.cuda.get_device_capability(), torch.cuda.get_device_name().lower().replace(' ', '_'))")
[ -n "${GPU:-}" ] || { echo "there is no GPU that torch can use"; exit 1; }
PARTS=build/gpu_check/$GPU
mkdir -p "$OUT" "$PARTS"
OUT=$(cd "$OUT" && pwd)
export CLLM_CUDA_ARCHS=${CLLM_CUDA_ARCHS:-$arch} OUT PARTS GPU PYTHON
log="$OUT/$GPU.log"
: > "$log"
failed=()
for name in "${stages[@]}"; do
  if [ "$name" != report ]; then
    begin=$SECONDS
    echo "== $name, at most ${LIMIT[$name]} s" | tee -a "$log"
    # An interrupt, upon which pytest still writes what it has; an end, 5 seconds later.
    timeout --signal=INT --kill-after=5 "${LIMIT[$name]}" env CLLM_STAGE="$name" bash scripts/gpu_check.sh 2>&1 \
      | tee -a "$log" || failed+=("$name")
    echo "== $name took $((SECONDS - begin)) s" | tee -a "$log"
  fi
  "$PYTHON" benchmarks/gpu_report.py "$PARTS" "$OUT/$GPU.json" "$OUT/$GPU.md" "${failed[@]}"
done
cat "$OUT/$GPU.md"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
