#!/usr/bin/env bash
# One round on a GPU machine, at most 8 minutes: GPU tests, a memory checker, attention over packed texts, text to
# vector, search, whole models, training steps and the GEMM race.
# A stage that fails does not stop the next; the exit status is 1 when any failed.
#
#     OUT=benchmarks/results/h200 bash benchmarks/gpu_round.sh
#
# OUT (default benchmarks/results; relative to the repository) receives the JSON files and a log per stage. Text
# to vector goes on with the rows that encode.json there lacks, if that is of the same commit.
# PYTHON names the interpreter (default: python, else python3), TRITERN_DATA a folder of labelled sets for real texts.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT="${OUT:-benchmarks/results}"
PYTHON="${PYTHON:-$(command -v python || command -v python3 || echo python)}"
export PYTHONPATH=.:kernels:benchmarks PYTHONUNBUFFERED=1
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
    local name=$1 limit=$2 left=$((ROUND - SECONDS)) begin=$SECONDS status note=""
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
    if ((status != 0)) && [[ -z $note || -z ${keeps_rows-} ]]; then failed=1; fi
    summary+=("stage $name: exit status $status, $((SECONDS - begin))s$note")
}

# part NAME SECONDS COMMAND...: a stage whose rows are in its JSON file as they come, so that it may be stopped
part() { keeps_rows=1 stage "$@"; }

if "$PYTHON" -c "import pytest" >/dev/null 2>&1; then
    workers=()
    if "$PYTHON" -c "import xdist" >/dev/null 2>&1; then workers=(-n 8); fi  # most of their time is compiling
    stage tests 110 "$PYTHON" -m pytest tests/kernels tests/library/test_fused.py tests/library/test_warmup.py -q \
        --ignore tests/kernels/test_compile.py ${workers[@]+"${workers[@]}"}
    stage engine 35 "$PYTHON" -m pytest -m gpu tests/library/test_engine*.py -q ${workers[@]+"${workers[@]}"}
else
    fail tests 127 "pytest is not installed for $PYTHON: pip install pytest"
fi
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor an allocation of its own
    stage memcheck 35 compute-sanitizer --tool memcheck --error-exitcode 1 "$PYTHON" tests/kernels/memcheck.py
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi

part attention 22 "$PYTHON" benchmarks/ops/attention.py --seconds 12 --json "$OUT/attention.json"
part encode 65 "$PYTHON" benchmarks/models/encode.py --seconds 0.3 --minutes 0.7 --json "$OUT/encode.json"
if "$PYTHON" -c "import faiss" >/dev/null 2>&1; then
    part search 48 "$PYTHON" benchmarks/search/embed_search.py --minutes 0.5 --repeat 3 --parts throughput latency \
        --arms fp16 "ternary int8" --ternary minilm-l6-ternary=tritern/models/minilm-l6-ternary \
        --json "$OUT/search.json" ${TRITERN_DATA:+--data "$TRITERN_DATA"}
else
    fail search 127 "faiss is not installed for $PYTHON: pip install faiss-gpu, or faiss-cpu"
fi
part models 50 "$PYTHON" benchmarks/models/encode_gpu.py --kinds eager graph --seconds 25 --json "$OUT/models.json"
texts=$(mktemp --suffix=.txt)
trap 'rm -f "$texts"' EXIT
"$PYTHON" -c "from models import encode; print(*encode.texts_for(encode.arguments().parse_args([]), 1024), sep='\n')" >"$texts"
stage train 80 "$PYTHON" benchmarks/models/train.py --texts "$texts" --steps 8 --json "$OUT/train.json"
part gemm 120 "$PYTHON" benchmarks/gemm.py --quick --json "$OUT/gemm.json"

echo
printf '%s\n' "${summary[@]}"
exit "$failed"
