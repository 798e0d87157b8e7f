#!/usr/bin/env bash
# What to run on a GPU, in order: perf/gpu_stages.sh STAGE [FOLDER]. Every stage takes under 8 minutes.
#   1  the gpu tests, then the floor of a step
#   2  the first table against nn.LSTM
#   3  the soak, then compute-sanitizer's memcheck and racecheck on the gpu tests of single launches
# Results go to FOLDER (default: perf/results). Needs only python3 with torch, triton, pytest and
# hypothesis: the package is laid out in a temporary folder, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
stage=${1:?stage 1, 2 or 3}
out=${2:-perf/results}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r lstm_triton "$site/" && cp -r kernels "$site/lstm_triton/kernels"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
case $stage in
  1)
    status=0
    timeout 360 "$python" -P -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py 2>&1 | tee "$out/gpu_tests.txt" || status=$?
    timeout 100 "$python" perf/floor.py --out "$out/floor.csv" || status=$?
    exit $status
    ;;
  2) timeout 470 "$python" perf/first_table.py --out "$out/first.csv" ;;
  3)
    status=0
    timeout 240 "$python" perf/soak.py --launches 10000 2>&1 | tee "$out/soak.txt" || status=$?
    for tool in memcheck racecheck; do
      timeout 110 compute-sanitizer --tool $tool --error-exitcode 1 \
        "$python" -P -m pytest -q -m gpu -p no:cacheprovider tests/test_gpu.py -k small 2>&1 | tee "$out/$tool.txt" || status=$?
    done
    exit $status
    ;;
  *) echo "no stage $stage" >&2; exit 2 ;;
esac
