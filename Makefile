# Every target sets up what it needs: a virtual environment in .venv with the locked versions.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test check lock docs clean

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

check: .venv/installed  ## Check format, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/make_config.py --check

docs: .venv/installed  ## Generate docs/config.md from the models.
	$(BIN)/python docs/make_config.py

lock: .venv/installed  ## Write the versions that .venv has to requirements.lock.
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

clean:  ## Remove what the targets made.
	rm -rf .venv $(DEMO)
