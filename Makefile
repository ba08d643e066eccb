# Each target is one command on a fresh machine: it makes its own virtual environment, installs, and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= demo_out
GALLERY ?= gallery_out
WORKERS ?= 2

PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

.PHONY: demo gallery test test-slow test-all bench lint docs clean

$(BIN)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/vision-attn demo --out $(OUT)

gallery: $(BIN)/.installed
	$(BIN)/vision-attn gallery --out $(GALLERY)

# Triton reads TRITON_INTERPRET when it is imported, so its interpreter takes a run of its own.
test: $(BIN)/.installed
	$(PYTEST) -m "not slow and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow and interpreter"

# pytest ends with 5 if there are no such tests.
test-slow: $(BIN)/.installed
	$(PYTEST) -m "slow and not interpreter" || test $$? -eq 5
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and interpreter" || test $$? -eq 5

test-all: test test-slow

bench: $(BIN)/.installed
	$(BIN)/vision-attn bench kernels

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint vision_attn

docs: $(BIN)/.installed
	$(BIN)/python docs/api.py build/docs

clean:
	rm -rf $(VENV) $(OUT) $(GALLERY) build/docs
