# make demo | make test | make lint, each on a machine with only Python, gcc and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cmake csrc/include/hicache/*.h)

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/hicache generate --out demo.png

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# an editable install of the package with one of its extras: demo, test or lint
$(VENV)/%.stamp: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info hicache_kernels/*.so demo.png
