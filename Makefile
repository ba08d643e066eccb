# Each target is one command on a fresh machine: it makes its own virtual environment, installs, and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= demo_out
GALLERY ?= gallery_out
WORKERS ?= 2

.PHONY: demo gallery test bench lint docs clean

$(BIN)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/vision-attn demo --out $(OUT)

gallery: $(BIN)/.installed
	$(BIN)/vision-attn gallery --out $(GALLERY)

test: $(BIN)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

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
