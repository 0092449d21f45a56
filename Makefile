# make demo   set up, quantize the demo detector without data, evaluate it
# make test   set up, run the tests
# make lint   set up, run ruff, mypy, codespell and the check of links
# make docs   set up, build the site into docs/_build/html; a warning is an error
# make reproduce-dry-run   set up, run every shipped config end to end on random
#             weights and two made-up images: an hour or two on a CPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs reproduce-dry-run clean

setup: $(READY)

# mmcv's operators compile against the installed torch, hence the order; pip
# keeps the wheel it builds. Change torch here and in requirements.txt together,
# then build with --no-cache-dir once: the cache does not know torch's version.
$(READY): Makefile requirements.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q 'setuptools>=77,<81' wheel ninja psutil packaging
	$(BIN)/pip install -q torch==2.12.1 torchvision==0.27.1
	@echo 'compiling the operators of mmcv, unless cached: about 10 minutes on 2 cores'
	MMCV_WITH_OPS=1 $(BIN)/pip install -q --no-build-isolation onedl-mmcv==2.3.6
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-build-isolation -e '.[test,lint,deploy,docs]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python demo/run.py

# Two processes of one thread each: a file's tests stay together, as they share runs.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest tests/test_docs/test_links.py

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

reproduce-dry-run: $(READY)
	$(BIN)/python benchmarks/reproduce_dry_run.py

clean:
	rm -rf $(VENV) work_dirs demo/data docs/_build
