# `make run`: the study in params.yaml, from text to report. `make test`: every test. Both set .venv up first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
READY := .venv/.ready

.PHONY: run record sync audit test lint lock setup clean

run: setup
	snakemake --cores all

setup: $(READY)

# The lock file names every package, so pip resolves nothing and brings in nothing else. A virtual environment that was
# made halfway has no .ready and is made anew. Most of what is installed is never imported: Python compiles the rest as it
# comes to it. pip works on one package at a time, so two install every second one each.
$(READY): requirements.lock pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	sed -n 'p;n' requirements.lock > .venv/odd.lock
	sed -n 'n;p' requirements.lock > .venv/even.lock
	pip install --quiet --no-compile --no-deps -r .venv/odd.lock & odd=$$!; \
	pip install --quiet --no-compile --no-deps -r .venv/even.lock; even=$$?; \
	wait $$odd && exit $$even
	pip install --quiet --no-deps --no-build-isolation --editable .
	pip check
	touch $@

# Let DVC record what a finished run made. It fails, recording nothing, if the run is not complete or results/ holds
# files that this study does not make.
record: setup
	snakemake --cores all
	universality study prune
	dvc commit --force --no-relink
	dvc status -q

# After `git clone` or `git checkout`: fetch what was recorded, and tell Snakemake that it is up to date.
sync: setup
	dvc pull
	dvc status -q
	snakemake --touch --forceall --cores 1

# Run everything again, stage by stage; not one byte of the results may change.
audit: setup
	rm -rf checkpoints
	cp dvc.lock dvc.lock.recorded
	dvc repro --force --no-run-cache
	cmp dvc.lock dvc.lock.recorded
	rm dvc.lock.recorded

test: setup
	python -m pytest

lint: setup
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile rules
	python tools/lint_workflow.py

# Written from the table in src/universality/study/dvc.py and the imports of each stage's code.
.PHONY: dvc.yaml
dvc.yaml: setup
	universality study dvc --out dvc.yaml

lock: pyproject.toml
	pip-compile --quiet --allow-unsafe --strip-extras --extra test --annotation-style=line \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		--output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+cpu /\1 /' requirements.lock

clean:
	rm -rf results/[!R]* logs checkpoints .snakemake
