# `make` alone lists the targets. Each works from nothing but Python ≥ 3.11 and make.
PYTHON ?= python3
STUDY ?= studies/digits.toml
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help reproduce test check fast slow portable coverage skipped docs benchmarks gpu clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

reproduce: $(VENV)/lab.stamp ## run the default study and write its report (STUDY=file for another)
	$(BIN)/spectreg reproduce $(STUDY)

test: check fast slow portable coverage skipped ## everything: lint, format, types, docs, then all tests and their coverage

check: $(VENV)/dev.stamp ## lint, format, types and docs only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet --strict --site-dir $(VENV)/site

fast: $(VENV)/dev.stamp ## the fast tests and the doctests
	$(BIN)/coverage run -m pytest -q -n 2 -m "not slow" --junitxml $(VENV)/fast.xml

slow: $(VENV)/dev.stamp ## the tests marked slow
	$(BIN)/coverage run -m pytest -q -n 2 -m slow tests --junitxml $(VENV)/slow.xml

# torch.compile makes code for these processors that does not compile (its Welford sums), so it is left out.
portable: $(VENV)/dev.stamp ## tests of numbers again, as on a processor without wide vectors
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
		NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL" $(BIN)/python -m pytest -q -n 2 -m portable -k "not compiled_network" tests

coverage: $(VENV)/dev.stamp ## what the fast and the slow tests covered, of those that ran since the last time
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

skipped: $(VENV)/dev.stamp ## which of the fast and the slow tests were left out, and why
	@$(BIN)/python tests/skipped.py $(VENV)/fast.xml $(VENV)/slow.xml

benchmarks: $(VENV)/bench.stamp ## measure cost beside every peer and write its pages (within 25 minutes)
	$(BIN)/python -m benchmarks

gpu: $(VENV)/lab.stamp ## all that only a GPU can tell, into docs/gpu.md, in ten minutes (DATA=folder of photographs)
	$(BIN)/python -m benchmarks.gpu $(if $(DATA),--data $(DATA))

docs: $(VENV)/dev.stamp ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove the environment and what the tools left; runs and results stay
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spectreg needs Python 3.11 or newer; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/lab.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[lab]'
	@touch $@

# The second line: peers that the tests compare with. They ask for torchvision, whose wheels bind to
# one torch build and which nothing here calls, so they come without their dependencies.
$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[lab,dev]'
	$(INSTALL) --no-deps curvlinops-for-pytorch backpack-for-pytorch unfoldNd einconv timm
	@touch $@ $(VENV)/lab.stamp

# Peers that the benchmarks time, without what they ask for and these rows do not call.
$(VENV)/bench.stamp: $(VENV)/dev.stamp
	$(INSTALL) -e '.[bench]'
	@for peer in pyhessian orthogonium deel-torchlip weightwatcher; do \
		$(INSTALL) --no-deps $$peer || echo "$$peer does not install: its rows will say so"; done
	@touch $@
