# `make test` and `make demo` set up everything they need in .venv.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: test lint types pytest compile machine oldest demo notebooks report sweep clean

test: lint types pytest compile

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# Everything that runs in Triton's interpreter.
pytest: .venv/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not gpu and not aot and not machine"

# Everything that needs compiled kernels: ahead of time, executed on the CPU, and on the GPU if there is one.
compile: .venv/installed
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "aot and not gpu"
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m machine

# The long version of what is executed on the CPU: every plan and type on every target, an hour on two cores.
machine: .venv/installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m machine --long

# The interpreter tests at the lower ends of what pyproject.toml admits, whose PyTorch is a CUDA build of some gigabytes.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not gpu and not aot and not machine"

demo: .venv/installed
	$(BIN)/python -m lstm_triton.recipes.char_lm --out demo

# The notebooks as they are committed: from full runs, half an hour on two cores.
notebooks: .venv/installed
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

report: .venv/installed
	$(BIN)/python perf/compile_report.py

# Measures what this machine can, draws it, and redraws the recorded results.
sweep: .venv/installed
	$(BIN)/python perf/sweep.py --out sweep/rows.csv --resume
	$(BIN)/python perf/plot.py --rows sweep/rows.csv
	$(BIN)/python perf/plot.py
	$(BIN)/python perf/compile_report.py --json sweep/compile.json

clean:
	rm -rf .venv .venv-oldest demo sweep build dist *.egg-info
