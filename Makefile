# make demo   set up, then search real text with a real ternary model
# make test   set up, then run the tests
# make lint   style, types
# Both set up .venv once: the CPU or CUDA build of torch first, then everything else at pinned versions.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint setup clean
demo: setup
	$(BIN)/python examples/quickstart.py $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "$(TRITON)"  # CUDA builds of torch bring theirs
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/optional kernels==0.17.2  # for one test, out of the way
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
