# make demo          the main job: a small study, then a table, curves, pictures and a report
# make demo FAST=1   the same in about two minutes, to see that it runs; its figures mean nothing
# make demo-incremental [FAST=1]   classes learned in two increments, and what is forgotten
# make test          lint, format check, tests
# make test-all      these, and the long sweeps: parity, every loss on every family, resuming, kills, processes, fuzzing
# make docs          the site of the documentation: build/site/index.html
#
# Each sets up .venv first: about two minutes and 6 GB, once. To use an environment of your own, in which Detectron2
# and what d2kd requires, its extras plots, export, timm, docs and test too, are installed:  make test PYTHON=/path/to/python

.PHONY: demo demo-incremental test test-all docs setup

ifdef PYTHON
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
setup:
	$(PY) -c "import d2kd.utils.compat"
else
PY := .venv/bin/python
setup: .venv/ready
endif

demo: setup
	$(PY) -m d2kd study projects/TAR/studies/few_labels.py --jobs 2 $(if $(FAST),--fast)

demo-incremental: setup
	$(PY) -m d2kd study projects/ERD/studies/shapes.py --jobs 2 $(if $(FAST),--fast) \
	    --output output/$(if $(FAST),incremental_fast,incremental)

test: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 -p tests.raise_sites -m "not sweep" tests

test-all: test
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 -m sweep tests
	for method in bckd crosskd cwd dist dkd fgd icd ld mgd pgd pkd reviewkd; do \
	    $(PY) -m tests.parity --method $$method tests/parity/$$method.npz || exit; done
	$(PY) -m tests.parity --method gfl tests/parity/gfl_erd.npz
	$(PY) -m tests.parity --method erd tests/parity/gfl_erd.npz
	$(PY) -m d2kd.testing
	$(PY) -m tests.two_processes
	$(PY) -m tests.resume_runs
	$(PY) -m tests.kill_runs --kills 20
	$(PY) -m tests.fuzz --examples 500
	$(PY) -m tests.odd_files --examples 2000

# The variable leaves out material's news of its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# torch comes first, because reading the Detectron2 archive's metadata imports it.
.venv/ready: setup.py constraints.txt d2kd/tools/install_detectron2.py
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -c constraints.txt torch torchvision setuptools wheel
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e ".[plots,export,timm,docs,test]"
	$(PY) -m d2kd install-detectron2 --constraint constraints.txt
	touch $@
