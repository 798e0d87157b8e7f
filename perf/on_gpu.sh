#!/usr/bin/env bash
# What to run on a GPU: perf/on_gpu.sh STAGE FOLDER [SECONDS]. Every stage ends within 8 minutes, a sweep or a soak
# within SECONDS; rows and logs go to FOLDER. In this order little time settles the most:
#   first      where there is a quarter of an hour in all: the gpu tests of the kernels, a step of every default plan
#              beside its prediction, and a few shapes of every region against nn.LSTM, with ceilings and floors
#   tests      the gpu tests of the kernels, then the ceilings
#   drop-in    the gpu tests of graphs, memory modes, ensembles, single steps and the like; a PPO update's resets
#   variants   the gpu tests of the cell's variants; their cost beside the plain cell's and beside loops over time
#   steps      the four configs of every problem that the planner likes most, beside their predictions
#   open       sweep of the region "open" (and so on: home, small, users, scaling)
#   tune       tune the default shapes and meet nn.LSTM; put the table where LATER stages find it:
#              mkdir -p lstm_triton/tuning/shipped && cp FOLDER/tables/*.json lstm_triton/tuning/shipped/
#   peers      the loops of tutorials, and flashrnn and torchrl where installed
#   soak       10,000 launches on two streams
#   sanitizer  compute-sanitizer's memcheck and racecheck on gpu tests of single launches
# Needs only python3 with torch, triton, pytest, hypothesis, matplotlib and tqdm: the package is laid out in a
# temporary folder, nothing is installed. With pytest-xdist tests compile side by side. LSTM_TRITON_COMMIT names the commit where there is no git.
# LSTM_TRITON_LIMITS=off lets everything run to its end: for a rehearsal, whose machine may be slow or have other work.
set -euo pipefail
[[ $# -eq 2 || ( $# -eq 3 && $3 =~ ^[1-9][0-9]*$ ) ]] || { echo "usage: perf/on_gpu.sh STAGE FOLDER [SECONDS]" >&2; exit 2; }
stage=$1 seconds=${3:-}
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python=${PYTHON:-python3}
# Without __pycache__, where files come and go while another process imports.
copy() { "$python" -c "import shutil, sys; shutil.copytree(*sys.argv[1:], ignore=lambda *_: ['__pycache__'])" "$@"; }
copy lstm_triton "$site/lstm_triton"
copy kernels "$site/lstm_triton/kernels"
# Without PYTHONSAFEPATH the checkout itself, which has no kernels inside lstm_triton/, would be imported.
export PYTHONSAFEPATH=1 PYTHONPATH="$site:$PWD/perf" PYTHONUNBUFFERED=1 LSTM_TRITON_CACHE_DIR="$out"
limited() {  # an interrupted sweep keeps its rows
  if [[ ${LSTM_TRITON_LIMITS:-on} == off ]]; then "${@:2}"; else timeout --signal INT --kill-after 20 "$@"; fi
}
parallel=()
if "$python" -c "import xdist" 2>/dev/null; then parallel=(-n 6 --dist worksteal); fi
gpu_tests() {
  "$@" "$python" -m pytest -q -m gpu -p no:cacheprovider "${parallel[@]}" "${files[@]}" ${select:+-k "$select"}
}
files=(tests/test_gpu.py)
sweep() {
  limited "${seconds:-460}" "$python" perf/sweep.py --out "$out/$stage.csv" --resume "$@" 2>&1 | tee "$out/$stage.txt"
}
steps() { "$@" 2>&1 | tee "$out/steps.txt"; }
status=0
case $stage in
  first)
    gpu_tests limited 210 2>&1 | tee "$out/tests.txt" || status=$?
    steps limited 60 "$python" perf/steps.py --out "$out/steps.csv" || status=$?
    limited 20 "$python" perf/host_overhead.py 2>&1 | tee "$out/host.txt" || status=$?
    seconds=${seconds:-180}
    sweep --set first --mode forward train --provider nn_lstm ours --repeat 15 || status=$?
    ;;
  steps)
    steps limited "${seconds:-460}" "$python" perf/steps.py --out "$out/steps.csv" --best 4 \
      --dtype bfloat16 float32-tf32 || status=$?
    ;;
  tests)
    gpu_tests limited 380 2>&1 | tee "$out/tests.txt" || status=$?
    limited 80 "$python" perf/floor.py --out "$out/floor.csv" 2>&1 | tee "$out/floor.txt" || status=$?
    ;;
  drop-in)
    files=(tests/test_gpu_drop_in.py)
    gpu_tests limited 300 2>&1 | tee "$out/drop-in.txt" || status=$?
    limited 120 "$python" perf/ppo_resets.py 2>&1 | tee "$out/ppo-resets.txt" || status=$?
    ;;
  variants)
    files=(tests/test_gpu_variants.py)
    gpu_tests limited 240 2>&1 | tee "$out/variants-tests.txt" || status=$?
    for size in 128 512; do
      limited 100 "$python" perf/variants.py --hidden-size $size 2>&1 | tee "$out/variants-$size.txt" || status=$?
    done
    ;;
  small | home | open | users) sweep --set "$stage" || status=$? ;;
  scaling) sweep --set scaling --provider nn_lstm ours_kernels per_step --mode forward train memory || status=$? ;;
  peers)
    sweep --set scratch home --mode forward train --provider nn_lstm nn_lstm_autocast ours ours_autocast separate_gates \
      separate_gates_compiled combined_gates combined_gates_compiled per_step flashrnn torchrl || status=$?
    ;;
  tune) limited 470 "$python" -m lstm_triton tune --budget 400 2>&1 | tee "$out/tune.txt" || status=$? ;;
  soak) limited "${seconds:-300}" "$python" perf/soak.py --launches 10000 2>&1 | tee "$out/soak.txt" || status=$? ;;
  sanitizer)
    select=small parallel=()
    for tool in memcheck racecheck; do
      gpu_tests limited 220 compute-sanitizer --tool "$tool" --error-exitcode 1 2>&1 | tee "$out/$tool.txt" || status=$?
    done
    ;;
  *) echo "no stage $stage" >&2; exit 2 ;;
esac
exit $status
