# make demo   a small Wan, a prompt, output/demo.mp4     make test      all but the slow tests
# make lint   ruff and mypy                              make wheel     built, installed, run
# make test-all        the slow tests too, and a part with three versions of diffusers
# make test-versions   equal bits with the oldest, a middle and the newest diffusers, in minutes
# Everything installs into .venv, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all test-versions lint wheel clean

demo: $(READY)
	$(BIN)/python -m wan_core demo --output output/demo.mp4

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m tools.version_matrix

test-versions: $(READY)
	$(BIN)/python -m tools.version_matrix --quick

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python -m tools.check_wheel

$(READY): requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $(READY)

clean:
	rm -rf $(VENV) output
