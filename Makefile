# Convince: `make demo` trains on the embedded digits, `make test` runs the whole suite; both set everything up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint models docs clean
demo: $(VENV)/.ready
	$(BIN)/convince train
	@echo "open the report named above in a browser"

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Convince needs Python 3.11 or newer; name it with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q --compile-bytecode -c constraints.txt -e '.[dev]'
	touch $@

models: $(VENV)/.ready
	$(BIN)/convince models --measure --table src/convince/models/measured.json
	$(MAKE) docs

docs: $(VENV)/.ready
	$(BIN)/python docs/make_parts_page.py
	$(BIN)/python docs/make_models_pages.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
