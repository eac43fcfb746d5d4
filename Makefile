# `make demo` and `make test` need Python >= 3.10 and nothing else; both may be run again and again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The suites take every core, a process each with one thread: threads that wait for each other cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow test-oldest lint types install

demo: install
	$(BIN)/l2t-fast train

test: install
	$(PYTEST)

# Many real networks against the reference.
test-slow: install
	$(PYTEST) -m slow

# The exactness tests once more on the oldest versions that setup.py admits, in an environment of their own
# (numpy < 2.4, because the interpreter of Triton 3.6 indexes with arrays of one element).
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/bin/.installed
	$(PYTEST:$(BIN)/%=$(OLDEST)/bin/%) -m core

$(OLDEST)/bin/.installed: setup.py pyproject.toml Makefile
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet torch==2.11.0 torchvision==0.26.0 triton==3.6.0 "numpy<2.4" -e ".[test]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy wants the package as it is installed, with kernels/ inside l2t_fast/: a tree of links shows it that.
types: install
	rm -rf build/types && mkdir -p build/types
	cp -rs "$(CURDIR)/l2t_fast" build/types/l2t_fast
	cp -rs "$(CURDIR)/kernels" build/types/l2t_fast/kernels
	$(BIN)/mypy build/types/l2t_fast

install: $(BIN)/.installed

$(BIN)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
