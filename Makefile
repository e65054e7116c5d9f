# make demo         the whole pipeline on simulated galaxies (minutes); moves the previous results/demo aside
# make demo-real    the same steps on three real galaxies, fetched from the archive (about 90 MB)
# make test         all tests, MaNGA's and ImageExtractor's
# make test-quick   MaNGA's tests without the slow ones (less than a minute)
# make test-faults  damages files of every kind, and interrupts every stage (a quarter of an hour)
# make test-slurm   the batch scripts on a real Slurm of one node (minutes); as root, installs it if missing
# make test-marvin  compares label maps with marvin, the survey's own tool, in an environment of its own
# make bench        speed, memory and disk space, as ratios (minutes)
# make benchmark-hard  metallicity on galaxies never seen, beside simple methods (half an hour)
# Each needs a virtual environment in .venv, which it creates from requirements*.txt, and recreates
# when those change. Another Python: make PYTHON=python3.12 demo. To use an environment of your own
# (on clusters, with GPUs), which is left unchanged: make VENV=/path/to/env SETUP=no test.
# torch is installed from pip's default index, which has CUDA builds for Linux on x86-64. A CPU
# build is much smaller: make TORCH_INDEX='--index-url https://download.pytorch.org/whl/cpu' demo.
PYTHON ?= python3
VENV ?= .venv
SETUP ?= yes
python = $(VENV)/bin/python
ready = $(VENV)/.ready
ifneq ($(SETUP),no)
ifneq ($(abspath $(VENV)),$(abspath .venv))
$(error only .venv is created here; to use $(VENV) unchanged, add SETUP=no)
endif
endif
STAMP = $(if $(filter no,$(SETUP)),,$(ready))

.PHONY: demo demo-real test test-manga test-quick test-faults test-slurm test-marvin lint bench bench-gpu benchmark-hard setup demo-cta test-cta bench-cta clean

demo: $(STAMP)
	PYTHON=$(python) bash demo.sh

# A test with real files, not of the method: three galaxies are far too few for a split by galaxies.
three = 8485-1901 7815-3702 8313-1901
demo-real: $(STAMP)
	$(python) download_utils.py --plateifu $(three) --data-dir data/real
	$(python) cube_processing.py --plateifu $(three) --data-dir data/real --no-splits
	$(python) create_easy_data_splits.py --data-dir data/real --overwrite
	$(python) run_SSFTT_training.py --data-dir data/real --split-dir easy_logOH --run-dir results/real --overwrite
	$(python) eval_fns.py --run-dir results/real
	$(python) map_galaxies.py --run-dir results/real
	$(python) vis_fns.py --run-dir results/real --plateifu $(three)

test: test-manga test-cta

test-manga: $(STAMP)
	$(python) -m pytest -n 2 --dist loadfile

test-quick: $(STAMP)
	$(python) -m pytest -n 2 --dist loadfile -m "not slow"

test-faults: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(python) tests/faults.py

test-slurm: $(STAMP)
	PYTHONPATH=.:tests $(python) tests/slurm_cluster.py

test-marvin: $(STAMP) .venv-marvin/.ready
	$(python) mock_manga.py --n-galaxies 4 --bundles 19 37 --data-dir results/marvin/data
	HOME=$(abspath results/marvin) .venv-marvin/bin/python tests/compare_marvin.py results/marvin/data

.venv-marvin/.ready: requirements-marvin.txt
	$(PYTHON) -m venv --clear .venv-marvin
	.venv-marvin/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy
	$(MAKE) -C image-extractor lint PYTHON=$(PYTHON)

bench: $(STAMP)
	$(python) benchmarks/run_all.py

benchmark-hard: $(STAMP)
	$(python) benchmarks/benchmark_hard.py --work-dir results/benchmark-hard/work

bench-gpu: $(STAMP)
	$(python) benchmarks/bench_network.py --device cuda --compile
	$(python) benchmarks/bench_network.py --device cuda --trace

demo-cta test-cta bench-cta:
	$(MAKE) -C image-extractor $(@:-cta=) PYTHON=$(PYTHON)

setup: $(STAMP)

$(ready): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d is too old, 3.11 or newer is needed: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check torch==2.13.0 $(TORCH_INDEX)
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:  # the environment and folders that make creates, with all that you have put there
	rm -rf $(if $(STAMP),$(VENV)) .venv-marvin data/demo data/real results/demo results/real
	rm -rf results/bench results/marvin results/faults
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	$(MAKE) -C image-extractor clean
