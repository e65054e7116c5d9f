# make demo   the whole pipeline on simulated galaxies (minutes)
# make test   every test, MaNGA's and ImageExtractor's
# Both set themselves up: a virtual environment in .venv from requirements*.txt, made anew when
# those change. Another Python: make PYTHON=python3.12 demo. To use an environment of your own
# (clusters, GPUs), which is left as it is: make VENV=/path/to/env SETUP=no test.
# torch comes from pip's default index, which has CUDA builds for Linux on x86-64. A CPU build, much
# smaller: make TORCH_INDEX='--index-url https://download.pytorch.org/whl/cpu' demo.
PYTHON ?= python3
VENV ?= .venv
SETUP ?= yes
python = $(VENV)/bin/python
ready = $(VENV)/.ready
ifneq ($(SETUP),no)
ifneq ($(abspath $(VENV)),$(abspath .venv))
$(error only .venv is set up here; to use $(VENV) as it is, add SETUP=no)
endif
endif
STAMP = $(if $(filter no,$(SETUP)),,$(ready))

.PHONY: demo test test-manga lint bench bench-gpu setup demo-cta test-cta bench-cta clean

demo: $(STAMP)
	PYTHON=$(python) bash demo.sh

test: test-manga test-cta

test-manga: $(STAMP)
	$(python) -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy
	$(MAKE) -C image-extractor lint PYTHON=$(PYTHON)

bench: $(STAMP)
	$(python) benchmarks/run_all.py

bench-gpu: $(STAMP)
	$(python) benchmarks/bench_network.py --device cuda --compile
	$(python) benchmarks/bench_network.py --device cuda --trace

demo-cta test-cta bench-cta:
	$(MAKE) -C image-extractor $(@:-cta=) PYTHON=$(PYTHON)

setup: $(STAMP)

$(ready): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d is too old: 3.11 or newer is needed. Name one: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check torch==2.13.0 $(TORCH_INDEX)
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/demo results .pytest_cache .ruff_cache .mypy_cache .hypothesis
	$(MAKE) -C image-extractor clean
