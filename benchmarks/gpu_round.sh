#!/usr/bin/env bash
# One round on a GPU machine, at most 8 minutes: the GPU tests, a memory checker, whole models, the GEMM race, encoding
# and search.
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
    workers=()
    if "$PYTHON" -c "import xdist" >/dev/null 2>&1; then workers=(-n 8); fi  # most of their time is compiling
    stage tests 150 "$PYTHON" -m pytest tests/kernels tests/library/test_fused.py tests/library/test_warmup.py -q \
        --ignore tests/kernels/test_compile.py ${workers[@]+"${workers[@]}"}
else
    fail tests 127 "pytest is not installed for $PYTHON: pip install pytest"
fi

if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own
    stage memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" tests/kernels/memcheck.py
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
stage models 95 "$PYTHON" benchmarks/encode_gpu.py --kinds eager graph --json "$OUT/models.json"

plot=()
if "$PYTHON" -c "import matplotlib" >/dev/null 2>&1; then
    plot=(--plot "$OUT/gemm.png")
else
    echo "no roofline plot: matplotlib is not installed (pip install tritern[bench])"
fi
stage gemm 150 "$PYTHON" benchmarks/gemm.py --quick --json "$OUT/gemm.json" ${plot[@]+"${plot[@]}"}
stage encode 60 "$PYTHON" benchmarks/encode.py --quick --json "$OUT/encode.json"
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
