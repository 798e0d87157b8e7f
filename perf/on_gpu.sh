#!/usr/bin/env bash
# What to run on a GPU: perf/on_gpu.sh STAGE FOLDER [SECONDS], from anywhere. Rows and logs go to FOLDER as they come, and
# a line for every step to FOLDER/summary.txt. In this order little time settles the most:
#   doctor     whether this machine can be used, in a minute: what is missing, the environment report, one tiny launch of
#              each placement and protocol beside nn.LSTM
#   first      where there is a quarter of an hour in all: doctor; launches that fill the device, streams, NaN; default
#              plans; the other gpu tests of the kernels; a step of every default plan beside its prediction; a few shapes
#              of every region against nn.LSTM, with ceilings and floors
#   tests      the gpu tests of the kernels, then the ceilings
#   drop-in    the gpu tests of graphs, memory modes, ensembles, single steps and the like; a PPO update's resets
#   variants   the gpu tests of the cell's variants; their cost beside the plain cell's and beside loops over time
#   steps      the four configs of every problem that the planner likes most, beside their predictions
#   rules      some shapes of every rule by which auto leaves a call to nn.LSTM, eager and in CUDA graphs, beside their
#              predictions; `perf/rules.py --rows FOLDER/rules.csv --gpu ARCH --write` then moves the predictions
#   open       sweep of the region "open" (and so on: home, small, users, scaling)
#   tune       tune the default shapes and meet nn.LSTM; put the table where LATER stages find it:
#              mkdir -p lstm_triton/planning/shipped && cp FOLDER/tables/*.json lstm_triton/planning/shipped/
#   peers      the loops of tutorials, and flashrnn and torchrl where installed
#   soak       10,000 launches on two streams
#   sanitizer  compute-sanitizer's memcheck and racecheck on gpu tests of single launches
# Each ends within 8 minutes, `first` within a quarter of an hour, a sweep or a soak within SECONDS. Before all of them,
# on a machine without a GPU that has the same Triton:
#   ahead      perf/on_gpu.sh ahead FOLDER [ARCH] compiles what doctor and first launch into FOLDER/triton-cache, for
#              sm_90 or another; with that folder they find it, and each stage what earlier ones have compiled
# Needs Python 3.10 or later with torch, triton and pytest, and says what is missing. The package is laid out in a
# temporary folder with tests and scripts beside it; nothing is installed, no file of the checkout is written. With
# pytest-xdist tests compile side by side. PYTHON names the interpreter; LSTM_TRITON_COMMIT the commit where there is no git.
# LSTM_TRITON_LIMITS=off lets everything run to its end, for a machine that is slow or has other work;
# LSTM_TRITON_REHEARSAL=1 does too, and asks for no GPU.
set -euo pipefail
stages=(doctor first tests drop-in variants steps rules small home open users scaling tune peers soak sanitizer ahead)
usage() {
  echo "usage: perf/on_gpu.sh STAGE FOLDER [SECONDS], or perf/on_gpu.sh ahead FOLDER [ARCH]" >&2
  echo "stages: ${stages[*]}" >&2
  exit 2
}
[[ $# -eq 2 || $# -eq 3 ]] || usage
stage=$1 seconds='' arch=sm_90
[[ " ${stages[*]} " == *" $stage "* ]] || { echo "no stage $stage" >&2; usage; }
if [[ $stage == ahead ]]; then arch=${3:-$arch}; else seconds=${3:-}; fi
[[ $seconds =~ ^([1-9][0-9]*)?$ ]] || usage

rehearsal=${LSTM_TRITON_REHEARSAL:-0}
limits=${LSTM_TRITON_LIMITS:-on}
if [[ $rehearsal == 1 ]]; then limits=off; fi
home=$(cd "$(dirname "$0")/.." && pwd)
if ! python=$(command -v "${PYTHON:-python3}"); then
  echo "on_gpu.sh: there is no ${PYTHON:-python3} (the variable PYTHON names another)" >&2
  exit 2
fi
if [[ $python == */* ]]; then python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python"); fi
without_gpu=()
if [[ $rehearsal == 1 || $stage == ahead ]]; then without_gpu=(--without-gpu); fi
"$python" "$home/perf/ready.py" ${without_gpu[@]+"${without_gpu[@]}"} || exit 2

mkdir -p "$2"
out=$(cd "$2" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# As an installation would have it, and with what tests and scripts read beside it. Without __pycache__, where files come
# and go while another process imports.
"$python" - "$home" "$site" << 'LAYOUT'
import importlib.util, pathlib, shutil, sys

home, site = map(pathlib.Path, sys.argv[1:])
for name in ("lstm_triton", "tests", "perf"):
    shutil.copytree(home / name, site / name, ignore=shutil.ignore_patterns("__pycache__", "results", ".*"))
shutil.copy(home / "pyproject.toml", site)
for path in (home / "perf/stand_ins").glob("*.py"):
    if importlib.util.find_spec(path.stem) is None:
        shutil.copy(path, site)
LAYOUT
: "${LSTM_TRITON_COMMIT:=$(git -C "$home" rev-parse --short HEAD 2> /dev/null || echo unknown)}"
export LSTM_TRITON_COMMIT
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 LSTM_TRITON_CACHE_DIR="$out" TRITON_CACHE_DIR="$out/triton-cache"
cd "$site"

status=0
limited() {  # an interrupted sweep keeps its rows
  if [[ $limits == off ]]; then "${@:2}"; else timeout --signal INT --kill-after 20 "$@"; fi
}
step() {  # NAME SECONDS COMMAND...: its output goes to NAME.txt, what became of it to summary.txt
  local name=$1 begin=$SECONDS code=0 said=ok
  echo "== $stage: $name"
  limited "${@:2}" 2>&1 | tee "$out/$name.txt" || code=$?
  case $code in
    0) ;;
    124 | 137) said="FAILED, stopped at its limit of $2 s" ;;
    *) said="FAILED, exit status $code" ;;
  esac
  if [[ $code -ne 0 ]]; then status=$code; fi
  echo "$stage: $name: $said, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
}
# Every test is named as it starts, and where it is once it hangs.
pytest=("$python" -m pytest -v -m gpu -p no:cacheprovider -o faulthandler_timeout=60)
side_by_side=()
if "$python" -c "import xdist" 2> /dev/null; then side_by_side=(-n 6 --dist worksteal); fi
alone() { step "$1" "$2" "${pytest[@]}" "${@:3}"; }
tests() { step "$1" "$2" "${pytest[@]}" ${side_by_side[@]+"${side_by_side[@]}"} "${@:3}"; }
script() { step "$1" "$2" "$python" "perf/$3" "${@:4}"; }
sweep() { script "$stage" "${seconds:-460}" sweep.py --out "$out/$stage.csv" --resume "$@"; }
doctor() {
  script compiled-for-doctor 15 ahead.py --stage doctor
  step report 15 "$python" -m lstm_triton doctor
  if grep -q "self-check: FAILED" "$out/report.txt"; then
    status=1
    echo "$stage: report: FAILED, see its self-check" | tee -a "$out/summary.txt"
  fi
  script launches 30 launches.py
}
of_kernels=tests/test_gpu.py
fill=test_launches_that_fill_the_device
spoil="streams_do_not_disturb or nan_and_inf"
plans=test_default_plans
case $stage in
  doctor) doctor ;;
  first)
    doctor
    # What would make the rest worthless comes first, nothing beside it.
    alone tests-fill 110 "$of_kernels" -k "$fill"
    alone tests-streams-nan 70 "$of_kernels" -k "$spoil"
    script compiled-for-first 100 ahead.py --stage first
    tests tests-plans 100 "$of_kernels" -k "$plans"
    tests tests-others 140 "$of_kernels" -k "not ($fill or $spoil or $plans)"
    script steps 60 steps.py --out "$out/steps.csv"
    script host 60 host_overhead.py
    seconds=${seconds:-180}
    sweep --set first --mode forward train --provider nn_lstm ours --repeat 15
    ;;
  steps) script steps "${seconds:-460}" steps.py --out "$out/steps.csv" --best 4 --dtype bfloat16 float32-tf32 ;;
  rules)
    script measured 400 rules.py --measure "$out/rules.csv"
    script compared 30 rules.py --rows "$out/rules.csv"
    ;;
  tests)
    tests tests 380 "$of_kernels"
    script floor 80 floor.py --out "$out/floor.csv"
    ;;
  drop-in)
    tests drop-in 300 tests/test_gpu_drop_in.py
    script ppo-resets 120 ppo_resets.py
    ;;
  variants)
    tests variants-tests 240 tests/test_gpu_variants.py
    for size in 128 512; do script "variants-$size" 100 variants.py --hidden-size "$size"; done
    ;;
  small | home | open | users) sweep --set "$stage" ;;
  scaling) sweep --set scaling --provider nn_lstm ours_kernels per_step --mode forward train memory ;;
  peers)
    sweep --set scratch home --mode forward train --provider nn_lstm nn_lstm_autocast ours ours_autocast separate_gates \
      separate_gates_compiled combined_gates combined_gates_compiled per_step flashrnn torchrl
    ;;
  tune) step tune 470 "$python" -m lstm_triton tune --budget 400 ;;
  soak) script soak "${seconds:-300}" soak.py --launches 10000 ;;
  sanitizer)
    for tool in memcheck racecheck; do
      step "$tool" 220 compute-sanitizer --tool "$tool" --error-exitcode 1 "${pytest[@]}" "$of_kernels" -k small
    done
    ;;
  ahead)
    limits=off  # no GPU waits for it
    script ahead 0 ahead.py --arch "$arch"
    ;;
esac
exit $status
