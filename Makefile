# make demo | make test | make test-slow | make lint | make coverage | make bench, each on a machine with only Python, gcc and make.
# docs/installing.md: make matrix | make compilers | make sanitize | make wheels

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
SOURCES := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cmake csrc/include/hicache/*.h)

.PHONY: demo test test-slow lint coverage bench matrix compilers sanitize wheels clean

demo: $(VENV)/demo.stamp
	$(BIN)/hicache demo --out demo.png

# two workers of one thread each; what times code (-m perf) and the slow rest (-m slow) is left out
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not perf' $(OPTIONS)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# which branches of the packages make test takes with all cases of its tests; tests/README.md says what of the rest
coverage: $(VENV)/coverage.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal --all-cases --cov --cov-report=term-missing:skip-covered

# on a quiet machine, and in less than ten minutes
bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.kernels --minutes 8 --seconds 0.3 --compiled 'FLUX 1024² stack' \
		--csv $(RESULTS)/kernels-cpu.csv
	$(BIN)/python -m benchmarks.launches --csv $(RESULTS)/launches.csv
	$(BIN)/python -m benchmarks.plots $(RESULTS)/kernels-cpu.csv $(RESULTS)/launches.csv

# every Python on the path, with every diffusers that is promised: many GB of downloads
matrix: $(VENV)/test.stamp
	$(BIN)/python -m tests.installation.matrix --csv $(RESULTS)/matrix.csv

# every C++ compiler on the path, and the bits of what it makes
compilers: $(VENV)/test.stamp
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m tests.installation.compilers --csv $(RESULTS)/compilers.csv

# fuzzed calls of the CPU kernels under gcc's sanitizers
sanitize: $(VENV)/test.stamp
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m tests.installation.sanitizers --csv $(RESULTS)/sanitizers.csv

# dist/: the source distribution, and a wheel of it for this Python that runs on other Linuxes
wheels: $(VENV)/release.stamp
	rm -rf build/wheels
	HICACHE_FORCE_NATIVE_BUILD=1 $(BIN)/python -m build --outdir build/wheels
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl
	cp build/wheels/*.tar.gz dist

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# an editable install of the package with one of its extras: demo, test, lint, coverage, bench or release
$(VENV)/%.stamp: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info hicache_kernels/*.so demo.png
