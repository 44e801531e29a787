# Everything works from a clone with Python 3.11 or later and nothing else installed.
#
#   make demo           the main job under Prefect: train, be killed twice, resume, prove it
#   make demo-airflow   the same under Airflow
#   make test           the test suite
#   make test-all       the same, with every case of what `make test` shows by a sample
#   make test-faults    one fault at every operation of a training, on each kind of store (hours)
#
# PYTHON=... chooses the interpreter, VENV=... where the environment is made.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV ?= .venv
UV_VERSION := 0.13.9
DEMO_FOLDER ?= demo-run
UI_PORT ?= 5000

STAMP := $(VENV)/.installed
UV := $(VENV)/bin/uv
# A folder of wheels, where pip has been told of one.
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
# Where python may not cache what it compiles, each process would compile torch again.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-airflow test test-all test-faults fuzz lint format ui wheel extras constraints clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "make install|fuzz|lint|format|ui|wheel|extras|constraints|clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed; found '$(PYTHON)'. Say PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	test -x $(UV) || $(VENV)/bin/python -m pip install --quiet uv==$(UV_VERSION)
	$(UV) pip install --quiet $(COMPILE) --python $(VENV)/bin/python $(FIND_LINKS) \
	  --constraints constraints.txt --editable '.[all]' --group dev
	touch $@

demo: $(STAMP)
	$(VENV)/bin/ckpt-tasks demo

demo-airflow: $(STAMP)
	$(VENV)/bin/ckpt-tasks demo --airflow

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --durations 40

test-all: $(STAMP)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --durations 40 -m 'exhaustive or not exhaustive'

# FAULTS="--places local --every 10" and the like choose among the cases: --help tells. Also a
# thousand random kills.
test-faults: $(STAMP)
	PYTHONPATH=$(CURDIR)/tests $(VENV)/bin/python -m support.sweep_faults $(FAULTS)
	CKPT_TASKS_RANDOM_KILLS=500 $(VENV)/bin/python -m pytest -o timeout=7200 \
	  -k identical_when_killed_at_random tests/faults/test_kill_random.py

# Checkpoints and records as an attacker would make them, and whole lives of runs beside a model,
# for some minutes. Tells how many.
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= $(shell date +%s)

fuzz: $(STAMP)
	$(VENV)/bin/python tests/support/fuzz_readers.py --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)
	CKPT_TASKS_FUZZ_EXAMPLES=20000 $(VENV)/bin/python -m pytest -o timeout=7200 \
	  tests/faults/test_hostile_checkpoints.py tests/unit/protocol/test_state_machine.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

ui: $(STAMP)
	@test -f "$(DEMO_FOLDER)/mlflow.db" || \
	  { echo "error: there is no $(DEMO_FOLDER)/mlflow.db yet: make demo" >&2; exit 2; }
	$(VENV)/bin/mlflow ui --backend-store-uri "sqlite:///$(DEMO_FOLDER)/mlflow.db" --port $(UI_PORT)

wheel: $(STAMP)
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation --wheel --outdir dist .

# Each extra alone, in a fresh environment, from the wheel.
extras: wheel
	$(VENV)/bin/python tests/packaging/check_extras.py --uv $(UV) dist/*.whl

constraints: $(STAMP)
	$(UV) pip compile --quiet --upgrade --python-version 3.11 $(FIND_LINKS) --no-header --no-annotate \
	  --extra all --group dev --output-file $(VENV)/constraints.txt pyproject.toml
	sed 's/+cpu$$//' $(VENV)/constraints.txt > constraints.txt

clean:
	rm -rf $(VENV) dist build $(DEMO_FOLDER) .mypy_cache .ruff_cache .pytest_cache .hypothesis
