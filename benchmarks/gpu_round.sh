#!/usr/bin/env bash
# One round on a GPU machine, at most 8 minutes: the GPU tests, the GEMM race, the encoding and the search benchmark.
# A stage that fails does not stop the next; the exit status is 1 when any failed.
#
#     OUT=benchmarks/results/h200 bash benchmarks/gpu_round.sh
#
# OUT (default benchmarks/results; relative to the repository) receives the JSON files, the plot and a log per stage.
# PYTHON names the interpreter (default: python, else python3), TRITERN_DATA a folder of labelled sets to search in.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT="${OUT:-benchmarks/results}"
PYTHON="${PYTHON:-$(command -v python || command -v python3 || echo python)}"
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
mkdir -p "$OUT" || exit 1

ROUND=465 # seconds for all stages, which leaves a margin to stop the last one
SECONDS=0
failed=0
summary=()

# fail NAME STATUS WHY: a stage that could not start
fail() {
    echo "$1: $3" | tee "$OUT/$1.log"
    summary+=("stage $1: exit status $2 ($3)")
    failed=1
}

# stage NAME SECONDS COMMAND...: run under a time limit, never past the round's end; log to OUT/NAME.log
stage() {
    local name=$1 limit=$2 left=$((ROUND - SECONDS)) status note=""
    shift 2
    if ((left < limit)); then limit=$left; fi
    if ((limit < 5)); then
        fail "$name" 124 "not started: the round's time is used up"
        return
    fi
    echo "== $name (at most ${limit}s): $*"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    if ((status == 124 || status == 137)); then note=" (stopped after ${limit}s)"; fi
    if ((status != 0)); then failed=1; fi
    summary+=("stage $name: exit status $status$note")
}

if "$PYTHON" -c "import pytest" >/dev/null 2>&1; then
    stage tests 180 "$PYTHON" -m pytest tests/kernels -q --ignore tests/kernels/test_compile.py
else
    fail tests 127 "pytest is not installed for $PYTHON: pip install pytest"
fi

plot=()
if "$PYTHON" -c "import matplotlib" >/dev/null 2>&1; then
    plot=(--plot "$OUT/gemm.png")
else
    echo "no roofline plot: matplotlib is not installed (pip install tritern[bench])"
fi
stage gemm 165 "$PYTHON" benchmarks/gemm.py --quick --json "$OUT/gemm.json" ${plot[@]+"${plot[@]}"}
stage encode 105 "$PYTHON" benchmarks/encode.py --quick --json "$OUT/encode.json"
if "$PYTHON" -c "import faiss" >/dev/null 2>&1; then
    if ((${#plot[@]})); then plot=(--plot "$OUT/search.png"); fi
    stage search 120 "$PYTHON" benchmarks/embed_search.py --repeat 3 --texts 2048 --json "$OUT/search.json" \
        ${TRITERN_DATA:+--data "$TRITERN_DATA"} ${plot[@]+"${plot[@]}"}
else
    fail search 127 "faiss is not installed for $PYTHON: pip install faiss-gpu, or faiss-cpu"
fi

echo
printf '%s\n' "${summary[@]}"
exit "$failed"
