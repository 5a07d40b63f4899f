#!/usr/bin/env bash
# Everything worth knowing about fastppo on one GPU machine, in under nine minutes, offline.
#
#   bench/gpu.sh [--device cuda] [--sizes gpu] [--wheels DIR]
#
# Builds the extension (needs a C++ compiler, scikit-build-core and pybind11), then runs the tests
# that need a GPU, the ceilings, the benchmarks, compute-sanitizer and the profiler. --wheels: a
# folder of wheels to install first, such as tyro's and the peers'. --device cpu --sizes smoke goes
# through all of it on a machine without a GPU.
#
# Results go to $OUT (./gpu-results) after every stage, so that a run that is cut off leaves what it
# has: stages.txt, tables.md, and everything, with JSON, logs, plots and traces, in results.tar.gz.
# Every stage has its own limit in seconds; their sum is below 540. A stage that
# fails stops none of the later ones, and the exit status says so in the end. PYTHON: the Python to
# use (python3), one that has torch.
set -uo pipefail

device=cuda sizes=gpu wheels=
while [ $# -gt 0 ]; do
  case $1 in
    --device | --sizes | --wheels)
      [ $# -ge 2 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2
      ;;
    *) echo "gpu.sh: unknown option $1; see the head of this file" >&2; exit 2 ;;
  esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-gpu-results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
if [ -n "$(ls -A "$out")" ]; then
  echo "gpu.sh: expected an empty folder for results, got $out; set OUT" >&2
  exit 2
fi
python=${PYTHON:-python3}
site=$(mktemp -d) results=$(mktemp -d)
trap 'rm -rf "$site" "$results"' EXIT
cd "$root" || exit 2
# What is installed is used, not the tree around it, which has no extension.
export PYTHONSAFEPATH=1 PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=99

failed=()
keep() { # what there is so far
  tar -czf "$out/results.new" -C "$results" . && mv "$out/results.new" "$out/results.tar.gz"
  [ ! -f "$results/tables.md" ] || cp "$results/tables.md" "$out"
}
stage() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1
  status=$?
  printf '%-10s %4d s  status %d\n' "$name" $((SECONDS - start)) "$status" | tee -a "$out/stages.txt"
  if [ "$status" -ne 0 ]; then
    failed+=("$name")
    tail -n 5 "$results/$name.log" | sed 's/^/    /'
  fi
  keep
}
bench() { # name, limit, cases...
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$python" -m fastppo bench --device "$device" --sizes "$sizes" \
    --output-dir "$results/$name" --cases "$@"
  # Where time ran out there is a result, and no tables yet.
  [ -f "$results/$name/result.json" ] && [ ! -f "$results/$name/tables.md" ] &&
    timeout 20 "$python" -m fastppo bench render "$results/$name" >/dev/null 2>&1
  [ -f "$results/$name/tables.md" ] && cat "$results/$name/tables.md" >>"$results/tables.md"
  keep
}
pip=("$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --target "$site")

[ "$device" = cpu ] || nvidia-smi >"$results/nvidia-smi.txt" 2>&1
if [ -n "$wheels" ]; then
  stage wheels 10 "${pip[@]}" "$wheels"/*.whl
fi
stage build 75 "${pip[@]}" --no-build-isolation "$root"
if ! "$python" -c "
import sys, fastppo
got, site = fastppo.__file__, sys.argv[1]
sys.exit(0 if got.startswith(site) else f'gpu.sh: expected the fastppo just built, got {got}')
" "$site"; then
  echo "the build's log is in $out/results.tar.gz" >&2
  exit 1
fi
tests=(-m gpu tests)
[ "$device" = cpu ] && tests=(-m "not gpu and not slow" tests/ops/test_gae.py tests/benchmarks)
stage tests 105 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
stage ceilings 20 "$python" -c "
import dataclasses, json, sys, torch
from fastppo.profiling.ceilings import measure_ceilings
json.dump(dataclasses.asdict(measure_ceilings(torch.device('$device'))), open(sys.argv[1], 'w'))
" "$results/ceilings.json"
bench head 130 linear_ppo_loss token_logprobs_forward token_logprobs linear_logprobs_forward \
  linear_logprobs
bench ops 70 gae ppo_loss value_loss gae_carry gae_classic whiten group_advantages
bench growth 40 head_by_vocabulary update_by_tokens update_by_length update_by_response_share
smoke=("$python" bench/kernel_smoke.py "$device")
if command -v compute-sanitizer >/dev/null && [ "$device" != cpu ]; then
  stage sanitizer 45 compute-sanitizer --error-exitcode 9 "${smoke[@]}"
else
  stage smoke 45 "${smoke[@]}"
fi
stage profile 35 "$python" -m fastppo profile op linear_ppo_loss --device "$device" \
  --size "$sizes" --output-dir "$results/profile"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; logs are in $out/results.tar.gz"
  exit 1
fi
echo "results are in $out"
