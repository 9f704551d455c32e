# make install: everything into .venv. make bench: that (once), and run the default suite, at most five minutes on two cores. make test: the same for the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
WORKERS ?= 2
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python
INSTALL_INPUTS := pyproject.toml constraints.txt scripts/install.py

.PHONY: install bench test accuracy-ci lint format docs clean

install: $(VENV)/.installed-bench

bench: $(VENV)/.installed-bench
	$(RUN) -m flexgen_bench $(ARGS)

# OMP_WAIT_POLICY: with a busy neighbour, torch's spinning threads make a run several times slower. Two workers of one thread each, a file of tests
# to one worker: most tests are too small for two threads.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# A few items of every kind of request, uncompressed and in 4 bits, with the controls: under three minutes on two cores, once the
# model and the data are there (python -m flexgen_bench fetch smollm2 accuracy). Its records are no results.
accuracy-ci: $(VENV)/.installed-test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(RUN) -m flexgen_bench accuracy tasks=ci limit=10 mode=w4 text_tokens=256 rerun=true results_dir=.cache/accuracy-ci $(ARGS)

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.installed-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Makes the generated pages and pictures anew and builds the site in site/; dead links and anchors are errors. ARGS=serve: shows it instead.
docs: $(VENV)/.installed-test
	$(RUN) scripts/docs_configuration.py
	$(RUN) scripts/docs_pictures.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs $(or $(ARGS),build --strict)

$(VENV)/.installed-%: $(INSTALL_INPUTS)
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11 or newer, or run: make $* PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) scripts/install.py $* --venv $(VENV)

# Records in results/ and the cache stay.
clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
