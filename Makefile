# `make quickstart` and `make test` need nothing installed but Python 3.11 or newer; each makes .venv/ first.

PYTHON ?= python3
RUN := .venv/bin/python
export TOKENIZERS_PARALLELISM = false
# One process per core, at most four, each of one thread; each file's tests in one of them.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest

.PHONY: quickstart reproduce test test-slow test-full test-newest test-lowest lint bench docs clean

quickstart: .venv/ready
	$(RUN) -m alignvlm.cli quickstart --output_dir out/quickstart

# What stages 1 to 3 bring to stage 4, on drawn scenes, against the band in docs/results.json.
reproduce: .venv/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(RUN) benchmarks/findings.py --reproduce

test: .venv/test-ready
	$(PYTEST) $(PARALLEL) -m "not slow"

# Those that take long: they start processes, browsers, compilers or a Hub, or read whole data sets.
test-slow: .venv/test-ready
	$(PYTEST) $(PARALLEL) -m slow

# Property tests with twenty-five times as many examples.
test-full: .venv/test-ready
	ALIGNVLM_TEST_EXAMPLES=25 $(PYTEST) $(PARALLEL)

# The model, remote-code, generation, stage, export and Hub tests under other releases of the libraries: the newest that the ranges in
# pyproject.toml allow on the day the environment is made (`make clean` for new ones), and the lowest they claim. torch is the same
# build in all. Checkpoints are exchanged with the environment of `make test`.
RELEASE_TESTS = tests/modeling_alignvlm tests/evaluation/test_answer.py tests/stages/test_stages.py tests/export tests/hub_upload/test_hub.py tests/hub_upload/test_vllm.py
OF_THE_HUB = test_hub and lfs and (loading_from_the_hub or beginning_to_end)
SELECTED = -k "not (flickr8k_recipe or kernels_agree or test_masking or two_processes or test_hub) or $(OF_THE_HUB)"

test-newest test-lowest: test-%: .venv-%/test-ready .venv/test-ready
	OMP_NUM_THREADS=1 ALIGNVLM_OTHER_PYTHON=$(CURDIR)/$(RUN) .venv-$*/bin/python -m pytest $(PARALLEL) $(RELEASE_TESTS) $(SELECTED)

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

# The documentation as a site in out/site, which can be read without network; a link that leads nowhere is an error.
docs: .venv/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Environments, caches and what was built; not out/, where trained checkpoints are.
clean:
	rm -rf .venv .venv-newest .venv-lowest out/site build *.egg-info .pytest_cache .ruff_cache

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[lora]'
	touch $@

.venv/test-ready: .venv/ready
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[browser,docs,lora,test]'
	touch $@

.venv-%/test-ready: pyproject.toml constraints.txt .ci/lowest.py
	$(PYTHON) -m venv .venv-$*
	grep '^torch==' constraints.txt > .venv-$*/constraints.txt
	[ $* = newest ] || $(PYTHON) .ci/lowest.py | grep -v '^torch==' >> .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt torch
	.venv-$*/bin/python -m pip install --quiet --upgrade --constraint .venv-$*/constraints.txt --editable '.[test]'
	touch $@
