# `make mnist` and `make test` do all the set-up on a machine with Python 3.11, pip, make and git.
#   make mnist OUT=runs/t8 ARGS="--set temperature=8"      make test ARGS="-k data"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OUT ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: mnist test clean

# Without OUT the command makes a new folder under runs/, so a second run is not in the way of the first.
mnist: .venv/installed
	$(BIN)/kdistill run mnist $(if $(OUT),--out "$(OUT)") $(ARGS)

# A file's tests stay in one process: TensorFlow's devices and random state are the process's.
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

# Editable: the sources are never older than what runs. setuptools maps kdistill.recipes to recipes/ and kdistill.exports
# to exports/ there too. Anything that has failed on the way is done again, as the stamp comes last.
.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	@echo "Set-up 1/3: a virtual environment in .venv"
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "kdistill needs Python 3.11, found: '$(PYTHON)'. Give its path: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
	@echo "Set-up 2/3: the build tools"
	@$(PIP) install -c constraints.txt setuptools wheel
	@echo "Set-up 3/3: kdistill and its pinned dependencies (about 2 GB, some minutes)"
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[test]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
