# make demo   train, evaluate and detect on the built-in data set
# make test   lint and the whole test suite (what CI runs)
# make test-long, make fuzz, make fault-table, make test-floor   the slow tier: docs/reliability.md
# make bench  every goal of speed against its peer, into benchmarks/record.csv (make bench-train: trainings, under an hour)
PYTHON ?= python3
VENV   ?= .venv
REQUIREMENTS ?= requirements-dev.txt
PY     := $(VENV)/bin/python

.PHONY: demo test test-floor test-long fuzz fault-table bench bench-train lint format setup clean

demo: $(VENV)/.installed
	$(PY) train.py --project runs/demo --name train --exist-ok --cache
	$(PY) test.py --weights runs/demo/train/weights/best.safetensors --project runs/demo --name test --exist-ok --verbose
	$(PY) detect.py --weights runs/demo/train/weights/best.safetensors --source data/shapes/images/val --project runs/demo --name detect --exist-ok
	@echo
	@echo "Look at       runs/demo/detect/*.jpg, runs/demo/train/val_batch0_pred.jpg"
	@echo "how it went   runs/demo/train/results.png    (live: $(VENV)/bin/tensorboard --logdir runs/demo/train/tensorboard)"
	@echo "checkpoint    runs/demo/train/weights/best.safetensors, and best.weights with network.cfg for Darknet and OpenCV"

test: $(VENV)/.installed-dev lint
	$(PY) -m pytest -q $(TESTS)

test-floor:  ## the suite with the oldest versions that requirements.txt allows (Python 3.10 to 3.12)
	$(MAKE) setup VENV=.venv-floor REQUIREMENTS=requirements-floor.txt
	.venv-floor/bin/python -m pytest -q $(TESTS)

test-long: $(VENV)/.installed-dev  ## everything, the long tests too (under an hour)
	$(PY) -m pytest -q -m "slow or not slow" $(TESTS)

fuzz: $(VENV)/.installed-dev  ## a million inputs per parser
	MATCHBOX_FUZZ=1000000 $(PY) -m pytest -q tests/faults/test_fuzz_*.py

fault-table: $(VENV)/.installed-dev  ## docs/fault-table.md from a run of the fault catalogue, long tests included
	$(PY) -m pytest -q -m "slow or not slow" tests/faults --fault-table docs/fault-table.md

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

TRAININGS  := assigners yolox_ladder time_to_accuracy
BENCHMARKS := $(filter-out $(TRAININGS),$(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/*.py)))

bench: $(VENV)/.installed  ## every goal of speed; adds rows to benchmarks/record.csv
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; OMP_NUM_THREADS=1 $(PY) -m benchmarks.$$name; done

bench-train: $(VENV)/.installed  ## comparisons by short trainings
	@set -e; for name in $(TRAININGS); do echo "== $$name"; OMP_NUM_THREADS=1 $(PY) -m benchmarks.$$name; done

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Matchbox needs Python >= 3.10, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12" if v < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements.txt $(REQUIREMENTS) | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	@touch $@ $(VENV)/.installed

clean:  ## caches only: runs, weights and data are yours
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
