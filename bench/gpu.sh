#!/usr/bin/env bash
# Everything worth knowing about fastppo on one GPU machine, in under nine minutes, offline.
#
#   bench/gpu.sh [--device cuda] [--sizes gpu] [--wheels DIR] [--stages "NAME ..."] [--seconds 520]
#                [--choices "NAME ..."]
#
# Installs fastppo (from a wheel of it in DIR, which must be of this tree, or by building it: that
# needs a C++ compiler, scikit-build-core and pybind11), then runs, the most telling first:
#
#   first    the tests that need a GPU, every op once against its reference, and a run of the trainer,
#            side by side: nothing is timed
#   step     the update and rollouts at the shape of Qwen2.5-0.5B, beside padded forms
#   loss, choices, logprobs, linear, ops, growth
#            `fastppo bench`, and what only a GPU can decide (gpu_choices.py)
#   profile  of one op
#   sanitizer  every op under compute-sanitizer
#
# --wheels: a folder of wheels to install first, such as tyro's and the peers' (`make wheels`).
# --stages: these alone, in the order above; what an earlier call left in OUT is kept.
# --choices: those of gpu_choices.py that are tried; all of them otherwise.
# --seconds: for everything; a stage is cut short, or left out, where the rest is less than its
# limit. --device cpu --sizes smoke goes through all of it on a machine without a GPU.
#
# Results go to $OUT (./gpu-results) after every stage, so that a run that is cut off leaves what it
# has: stages.txt, tables.md, and everything, with JSON, logs, plots and traces, in results.tar.gz.
# A stage that fails stops none of the later ones, and the exit status says so in the end. PYTHON:
# the Python to use (python3), one that has torch.
set -uo pipefail

device=cuda sizes=gpu wheels= seconds=520 choices=
stages="first step loss choices logprobs linear ops profile growth sanitizer"
while [ $# -gt 0 ]; do
  case $1 in
    --device | --sizes | --wheels | --stages | --choices | --seconds)
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
site=$(mktemp -d) results=$(mktemp -d)
trap 'rm -rf "$site" "$results"' EXIT
if [ -f "$out/results.tar.gz" ]; then
  tar -xzf "$out/results.tar.gz" -C "$results" || exit 2
elif [ -n "$(ls -A "$out")" ]; then
  echo "gpu.sh: expected an empty folder for results, or one of a call before, got $out; set OUT" >&2
  exit 2
fi
python=${PYTHON:-python3}
cd "$root" || exit 2
# What is installed is used, not the tree around it, which has no extension.
export PYTHONSAFEPATH=1 PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 KINETO_LOG_LEVEL=99 PYTHONUNBUFFERED=1

failed=()
keep() { # what there is so far
  cat "$results"/*/tables.md >"$results/tables.md" 2>/dev/null && cp "$results/tables.md" "$out"
  tar -czf "$out/results.new" -C "$results" . && mv "$out/results.new" "$out/results.tar.gz"
}
wanted() { [[ " $stages " == *" $1 "* ]]; }
stage() { # name, limit in seconds, command...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [ "$limit" -le $((seconds - SECONDS)) ] || limit=$((seconds - SECONDS))
  if [ "$limit" -lt 5 ]; then
    printf '%-10s left out: no time\n' "$name" | tee -a "$out/stages.txt"
    return 1
  fi
  # an interrupt first: a program that is cut off says where it was
  timeout -s INT -k 15 "$limit" "$@" >"$results/$name.log" 2>&1
  status=$?
  {
    printf '%-10s %4d s  status %d\n' "$name" $((SECONDS - start)) "$status"
    [ "$status" -eq 0 ] || tail -n 5 "$results/$name.log" | cut -c1-300 | sed 's/^/    /'
  } | tee -a "$out/stages.txt"
  return "$status"
}
run() { # a stage of its own, with its results kept
  stage "$@" || failed+=("$1")
  keep
}
bench() { # name, limit, cases...
  local name=$1 limit=$2
  shift 2
  wanted "$name" || return
  rm -rf "${results:?}/$name"
  run "$name" "$limit" "$python" -m fastppo bench --device "$device" --sizes "$sizes" \
    --output-dir "$results/$name" --cases "$@"
  # Where time ran out there is a result, and no tables yet.
  if [ -f "$results/$name/result.json" ] && [ ! -f "$results/$name/tables.md" ]; then
    timeout 20 "$python" -m fastppo bench render "$results/$name" >/dev/null 2>&1
    keep
  fi
}
pip=("$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile
  --target "$site")

[ "$device" = cpu ] || nvidia-smi >"$results/nvidia-smi.txt" 2>&1
cp "$wheels/commit.txt" "$results" 2>/dev/null || git rev-parse HEAD >"$results/commit.txt" 2>/dev/null
[ -z "$wheels" ] || run wheels 30 "${pip[@]}" "$wheels"/*.whl
[ -d "$site/fastppo" ] || run build 75 "${pip[@]}" --no-build-isolation "$root"
if ! "$python" - "$site" "$root" <<'PYTHON'; then
import filecmp, pathlib, sys

import fastppo

site, root = map(pathlib.Path, sys.argv[1:])
if not pathlib.Path(fastppo.__file__).is_relative_to(site):
    sys.exit(f"gpu.sh: expected the fastppo just installed, got {fastppo.__file__}")
for path in [*root.glob("fastppo/**/*.py"), *root.glob("kernels/**/*.py")]:
    there = site / path.relative_to(root / "kernels" if "kernels" in path.parts[-2] else root)
    if not there.exists() or not filecmp.cmp(path, there, shallow=False):
        sys.exit(f"gpu.sh: expected a wheel of this tree, but {path} is another; build it anew")
PYTHON
  echo "the log of the build is in $out/results.tar.gz" >&2
  keep
  exit 1
fi

smoke=("$python" bench/kernel_smoke.py "$device")
if wanted first; then
  # only files with such tests are collected; several processes compile kernels side by side
  mapfile -t tests < <(grep -rl "mark\.gpu" tests --include='test_*.py')
  tests+=(-m gpu)
  [ "$device" = cpu ] && tests=(-m "not gpu and not slow" tests/ops/test_gae.py tests/benchmarks)
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n "$([ "$device" = cpu ] && echo 2 || echo 8)")
  jobs=()
  stage tests 150 "$python" -m pytest -q -W default -p no:cacheprovider -p no:benchmark \
    "${tests[@]}" & jobs+=("tests:$!")
  stage smoke 100 "${smoke[@]}" & jobs+=("smoke:$!")
  stage demo 100 "$python" -m fastppo demo --device "$device" --output-dir "$results/demo" &
  jobs+=("demo:$!")
  for job in "${jobs[@]}"; do
    wait "${job#*:}" || failed+=("${job%:*}")
  done
  keep
fi
if wanted step; then
  options=(--model random-qwen2.5-0.5b --sequences 64 --prompt-tokens 64 256 --response-tokens 32 512
    --rows 8 --token-budget 16384 --precision bf16 --decode-rows 64 256 --new-tokens 64 --repeats 3)
  [ "$device" = cpu ] && options=(--model random-tiny --sequences 4 --rows 2 --repeats 1)
  run step 120 "$python" bench/bench_step.py "${options[@]}"
fi
bench loss 90 linear_ppo_loss
if wanted choices && [ "$device" != cpu ]; then
  # shellcheck disable=SC2086 # names
  run choices 240 env PYTHONPATH="$PYTHONPATH:$root/bench" "$python" bench/gpu_choices.py \
    $choices --output "$results/choices.json"
fi
bench logprobs 60 token_logprobs_forward token_logprobs
bench linear 80 linear_logprobs_forward linear_logprobs
bench ops 90 gae ppo_loss value_loss gae_carry gae_classic whiten group_advantages
if wanted profile; then
  rm -rf "$results/profile"
  run profile 35 "$python" -m fastppo profile op linear_ppo_loss --device "$device" \
    --size "$sizes" --output-dir "$results/profile"
fi
bench growth 60 head_by_vocabulary update_by_tokens update_by_length update_by_response_share
if wanted sanitizer && command -v compute-sanitizer >/dev/null && [ "$device" != cpu ]; then
  # torch's pool would hide reads beyond an array
  run sanitizer 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    "${smoke[@]}"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; logs are in $out/results.tar.gz"
  exit 1
fi
echo "results are in $out"
