# `make quickstart` and `make test` need nothing installed but Python 3.10 or newer; each makes .venv/ first.

PYTHON ?= python3
RUN := .venv/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test lint bench clean

quickstart: .venv/ready
	$(RUN) -m training.quickstart --output_dir out/quickstart

test: .venv/test-ready
	$(RUN) -m pytest

lint: .venv/test-ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: .venv/test-ready
	@for script in benchmarks/*.py; do [ -e "$$script" ] || continue; echo "== $$script"; $(RUN) "$$script" || exit 1; done

clean:
	rm -rf .venv out build *.egg-info .pytest_cache .ruff_cache

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[lora]'
	touch $@

.venv/test-ready: .venv/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test,lora]'
	touch $@
