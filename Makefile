# make demo | make test | make test-slow | make lint | make bench, each on a machine with only Python, gcc and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cmake csrc/include/hicache/*.h)

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/hicache generate --out demo.png

# two workers of one thread each; what times code (-m perf) and the slow rest (-m slow) is left out
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not perf'

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# on a quiet machine, and in less than ten minutes
bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.kernels --minutes 8 --seconds 0.3 --compiled 'FLUX 1024² stack' \
		--csv $(RESULTS)/kernels-cpu.csv
	$(BIN)/python -m benchmarks.launches --csv $(RESULTS)/launches.csv
	$(BIN)/python -m benchmarks.plots $(RESULTS)/kernels-cpu.csv $(RESULTS)/launches.csv

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# an editable install of the package with one of its extras: demo, test, lint or bench
$(VENV)/%.stamp: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info hicache_kernels/*.so demo.png
