# `make mnist`, `make quick` and `make test` do all the set-up on a machine with Python 3.11, pip, make and git.
#   make mnist OUT=runs/t8 ARGS="--set temperature=8"      make test ARGS="tests/data"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: mnist quick test exhaustive docs dist clean

# Without OUT the command creates a new folder under runs/, so that runs do not collide.
mnist: .venv/installed
	$(BIN)/kdistill run mnist $(if $(OUT),--out "$(OUT)") $(ARGS)

# The tests of a file run in one process, because TensorFlow's devices and random state belong to the process.
# tests/conftest.py puts the longest files first.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Lint, format, imports and all tests of about a second: 2 to 3 minutes on 2 cores.
quick: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

# All but the exhaustive tests, and the 15 slowest at the end.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not exhaustive" --durations=15 $(ARGS)

# Everything: before a release, and after a change of training, conversion or compression.
exhaustive: .venv/installed
	$(PYTEST) --durations=15 $(ARGS)

# The pages of docs/ as a site in site/, without the network after the set-up. A warning, such as a link that leads nowhere, fails.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

# Wheel and source archive in dist/, built, and installed without the repository into an empty environment, which runs a recipe.
# Other versions: make dist CONSTRAINTS=versions.txt PYTHON=python3.13; without any bounds: make dist CONSTRAINTS=/dev/null
CONSTRAINTS ?= constraints.txt
dist: .venv/installed
	rm -rf build dist
	$(BIN)/python setup.py --quiet sdist bdist_wheel
	@"$(PYTHON)" -m venv build/empty
	build/empty/bin/python -m pip --quiet --disable-pip-version-check install -c $(CONSTRAINTS) dist/*.whl
	cd build/empty && bin/kdistill doctor && bin/kdistill run mnist --variant smoke
	@ls -l dist

# An editable installation runs the current sources. setuptools maps kdistill.recipes to recipes/ and kdistill.exports to
# exports/. The stamp comes last, so that `make` repeats a set-up that failed.
.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	@echo "Set-up 1/3: a virtual environment in .venv"
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "kdistill needs Python 3.11 to 3.13, found: '$(PYTHON)'. Give its path: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
	@echo "Set-up 2/3: the build tools"
	@$(PIP) install -c constraints.txt setuptools wheel
	@echo "Set-up 3/3: kdistill and its pinned dependencies (about 2 GB, some minutes)"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

.venv/docs: .venv/installed
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info
