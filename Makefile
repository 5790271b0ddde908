# `make quickstart` and `make test` need nothing installed but Python 3.10 or newer; each makes .venv/ first.

PYTHON ?= python3
RUN := .venv/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test test-full lint bench clean

quickstart: .venv/ready
	$(RUN) -m training.quickstart --output_dir out/quickstart

test: .venv/test-ready
	$(RUN) -m pytest

# Property tests with twenty-five times as many examples.
test-full: .venv/test-ready
	ALIGNVLM_TEST_EXAMPLES=25 $(RUN) -m pytest

lint: .venv/test-ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# An hour and a half on a CPU; `benchmarks/throughput.py --quick` has the main comparison.
bench: .venv/test-ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN) benchmarks/throughput.py --large
	$(RUN) benchmarks/generation.py
	$(RUN) benchmarks/data.py
	@[ -z "$$ALIGNVLM_TEST_DATA" ] || $(RUN) benchmarks/cider.py

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
