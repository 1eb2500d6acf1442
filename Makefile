# Two commands matter: `make demo` and `make test`. Each sets up what it needs, on a machine with Python 3.11+ alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := schemas producer worker ops
# A strict editable install links files one by one, so a file that comes or goes means installing again.
FOLDERS := $(shell find $(PACKAGES) -type d -not -name __pycache__)

.PHONY: setup demo demo-learn test lint format types wheel tests bench-queue bench-saturation bench-recovery bench-scale bench-policy bench-in-process chaos docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(FOLDERS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[local,dev]' --config-settings editable_mode=strict
	touch $(VENV)/.local $@

# Without what only tests and examples need: no JAX beside the engine's own.
$(VENV)/.local: pyproject.toml $(FOLDERS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[local]' --config-settings editable_mode=strict
	touch $@

demo: $(VENV)/.local
	$(BIN)/rollpool demo

demo-learn: setup
	$(BIN)/python -m examples.grpo_tiny

test: setup
	$(BIN)/python tests/stages.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/python tests/stages.py wheel types

wheel: setup
	$(BIN)/python tests/stages.py wheel

tests: setup
	$(BIN)/pytest

bench-queue: setup
	$(BIN)/python benchmarks/bench_queue.py

bench-recovery: setup
	$(BIN)/python benchmarks/bench_recovery.py

bench-saturation: setup
	$(BIN)/python benchmarks/bench_saturation.py

bench-scale: setup
	$(BIN)/python benchmarks/bench_scale.py

bench-policy: setup
	$(BIN)/python benchmarks/bench_policy.py

# The engine is in the process itself: run by an interpreter with sglang-jax main and rollpool[local].
bench-in-process:
	$(or $(ROLLPOOL_BENCH_MAIN_PYTHON),$(BIN)/python) benchmarks/bench_in_process.py

chaos: setup
	$(BIN)/python tests/chaos/run_storm.py

docs: setup
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
