# make demo    the whole pipeline on drawn characters, a few minutes on two cores
# make test    the default tests
# make config  docs/config.md: every key of every verb
# make costs   docs/costs.md: parameters and multiply-adds of the papers' tables
# make bench   tests/benchmarks: tables, and runs/bench/NAME.json
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
# The CPU is shared: one thread for each process, and several processes.
export OMP_NUM_THREADS ?= 1
# Two processes run the tests, each whole files in their order: the longest are not left for the end.
SPREAD  = -n 2 --no-loadscope-reorder

.PHONY: demo test test-long bench config costs lint clean

demo: $(VENV)/installed
	$(BIN)/concentrate run workdir=runs/demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SPREAD) -m "not long"

test-long: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SPREAD)

bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/reading.py
	$(BIN)/python tests/benchmarks/order.py
	$(BIN)/python tests/benchmarks/records.py
	$(BIN)/python tests/benchmarks/targets.py
	$(BIN)/python tests/benchmarks/head.py
	$(BIN)/python tests/benchmarks/student.py
	$(BIN)/python tests/benchmarks/metrics.py
	$(BIN)/python tests/benchmarks/sharded_head.py

config: $(VENV)/installed
	$(BIN)/python docs/config_keys.py

costs: $(VENV)/installed
	$(BIN)/python docs/costs.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
