# Two commands set everything up: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
# One for each of two cores: a third makes all of them slower by more than it fills of what waits.
WORKERS ?= 2

# Tests in which annotations are checked at run time, shapes included: the fewest that reach all functions with shapes
# that quick tests reach. Checking takes as long as the tests themselves, so the others run without.
SHAPES := attention_measures behaviour_command checkpoints chunking families hooks_attention initial_state \
	interventions measures model_settings rates spectra stability_hooked system_prompts trace training_evaluate \
	training_penalties

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PIP_INSTALL := $(PIP) install --quiet --disable-pip-version-check
# The stamps hold what is installed; a change of the requirements or the pins makes them old.
RUN_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test

DEMO := out/demo
DEMO_ANALYSIS := demo:injected --prompts word-problems --limit 16 --recurrences 32 --horizon 64

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format docs docs-check bench crash fuzz soak audit pins clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(RUN_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'loopscope needs Python 3.11 or newer, which "$(PYTHON)" is not: name one, as in make PYTHON=/usr/bin/python3.12 demo' >&2; exit 1; }
	@echo 'Installing loopscope into $(VENV) (the first time this takes minutes: torch is large)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --constraint constraints.txt --editable .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	@echo 'Installing what the tests need'
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[devices,figures,hub,lm-eval,ray,test,transformers]'
	@touch $@

install: $(RUN_STAMP) ## Install loopscope into .venv, with the pinned versions

demo: $(RUN_STAMP) ## Analyse the shipped demo model; the last line is the path of the HTML report
	@$(BIN)/loopscope analyze $(DEMO_ANALYSIS) --out $(DEMO)

lint: $(TEST_STAMP) ## Style, types, and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

test: lint ## Everything that must hold: lint, then the tests, the documentation's commands among them
	$(BIN)/pytest --numprocesses=$(WORKERS) --shapes $(SHAPES:%=tests/test_%.py)
	$(BIN)/pytest --numprocesses=$(WORKERS) $(SHAPES:%=--ignore=tests/test_%.py)

format: $(TEST_STAMP) ## Mend what can be mended by itself
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

docs: $(RUN_STAMP) ## Build the documentation's site; the last line is the path of its first page
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	@$(BIN)/python tools/build_site.py

docs-check: $(TEST_STAMP) ## Run the commands of README and docs/, with their output
	$(BIN)/python tools/run_doc_commands.py

bench: $(TEST_STAMP) ## Print the cost of an analysis as ratios to the bare forward passes
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

fuzz: $(TEST_STAMP) ## Try 5,000 damaged inputs and those that once failed, and print the counts by kind
	$(BIN)/python tests/fuzzing.py 5000
	$(BIN)/python tools/known_faults.py

crash: $(TEST_STAMP) ## End commands at each operation on a file and at random, with full and failing disks, and run them again
	$(BIN)/python tools/crash.py

soak: $(TEST_STAMP) ## An analysis of 2,000 prompts with two workers, and large studies: memory, and what is left open
	$(BIN)/python tools/soak.py
	$(BIN)/python tools/large_study.py

# Strictly: without the network, or where an index says nothing of a version, that is said, and is no success.
audit: ## Look for published vulnerabilities of the pinned dependencies; needs pypi.org
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# Everything moves to its newest release but torch, which stays at the version that constraints.txt names: of torch there
# are several builds, and an index may offer a newer one than the tests know.
pins: ## Resolve the dependencies anew and write constraints.txt
	rm -rf build/pins
	$(PYTHON) -m venv build/pins
	grep '^torch==' constraints.txt > build/pins/torch.txt
	build/pins/bin/python -m pip install --quiet --constraint build/pins/torch.txt --editable '.[devices,docs,figures,hub,lm-eval,ray,test,transformers]'
	@echo '# The versions that the tests run with. Written by `make pins`; do not edit, but for the line of torch.' > build/pins/constraints.txt
	build/pins/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> build/pins/constraints.txt
	mv build/pins/constraints.txt constraints.txt
	rm -rf build/pins

clean: ## Remove the environment, builds and caches; out/ stays
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
