# Two commands are all that most people need: make lab, make test. `make help` lists the rest.
# Beforehand: make, and Python 3.11, 3.12 or 3.13.

# PYTHON=python3.12       the Python to make .venv with (found by itself otherwise)
# CHAPTER=02              the chapter that `make lab` opens
# LAB_ARGS=--no-browser   further options for JupyterLab
# STAGES="code browser"   the parts of the tests to run: code solutions chapters browser
# TORCH_INDEX=<address>   where pip also looks for torch; see "A small torch on Linux" in docs/INSTALL.md
PYTHON ?=
CHAPTER ?=
LAB_ARGS ?=
STAGES ?=
TORCH_INDEX ?=

ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python.exe
else
VENV_PYTHON := .venv/bin/python
endif

# The Python named by PYTHON; otherwise the first on PATH that fits; otherwise python3, which then says what is wrong.
define install
	@chosen="$(PYTHON)"; exact=--this-python; \
	if [ -z "$$chosen" ]; then \
		exact=; \
		for candidate in python3 python3.13 python3.12 python3.11 python; do \
			if $$candidate tools/install.py --fits >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
		done; \
	fi; \
	chosen="$${chosen:-python3}"; \
	if ! command -v "$$chosen" >/dev/null; then \
		echo "$$chosen was not found: this course needs Python 3.11, 3.12 or 3.13, from python.org or your system's packages." >&2; \
		exit 1; \
	fi; \
	exec "$$chosen" tools/install.py $(1) $$exact --torch-index "$(TORCH_INDEX)"
endef

.PHONY: help lab test chapters claims weights teacher bench constraints clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## ?/\1\t/' | expand -t 14

lab: ## set up once, copy new chapters into my/, open JupyterLab
	$(call install,lab)
	@$(VENV_PYTHON) -m tools.start $(CHAPTER) $(LAB_ARGS)

test: ## set up once, then all tests: code, notebooks, and the browser where Chromium is there
	$(call install,test)
	@$(VENV_PYTHON) -m tests.run $(STAGES)

chapters: ## derive chapters/ from solutions/, run both, then what `make claims` does
	$(call install,test)
	@$(VENV_PYTHON) -m tools.chapters
	@$(VENV_PYTHON) -m tools.claims
	@$(VENV_PYTHON) -m tools.pictures

claims: ## collect docs/CLAIMS.md and docs/images/ from the executed notebooks
	$(call install,test)
	@$(VENV_PYTHON) -m tools.claims
	@$(VENV_PYTHON) -m tools.pictures

weights: ## train every model of the course ahead of time, for a workshop
	$(call install,lab)
	@$(VENV_PYTHON) -m tools.weights

teacher: ## install a real language model for chapter 08 to learn from, once (93 MB)
	$(call install,lab)
	@$(VENV_PYTHON) -m tools.teacher

bench: ## speed beside transformers, torchao and TRL, into docs/BENCH.md
	$(call install,test)
	@$(VENV_PYTHON) -m bench.speed

constraints: ## write constraints.txt from what .venv holds
	$(call install,test)
	@$(VENV_PYTHON) -m tools.constraints

clean: ## remove .venv and what tests left behind; my/ stays
	rm -rf .venv tests/artifacts .pytest_cache .hypothesis .ruff_cache .import_linter_cache *.egg-info
	find mini tests tools bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
