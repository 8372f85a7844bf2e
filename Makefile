# `make demo` and `make test` need Python >= 3.10 with venv, and nothing else.
# They make an environment of their own in .venv and build what this machine can build.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
ORACLES := keye-vl-utils==1.5.2 einops==0.8.2 opencv-python-headless==5.0.0.93
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format bench clean

demo: $(VENV)/.package
	$(BIN)/keye-ops demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/keye-ops bench $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info keye_ops/*.so $(VENV)

# ---- the environment, a stamp a stage ----

# Without an NVIDIA driver the CPU build of torch is enough, and much smaller.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"keye_ops needs Python >= 3.10, got {v.major}.{v.minor}; try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo 'the venv module is needed: apt install python3-venv'; exit 1; }
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "installing torch for this NVIDIA driver ..."; \
		$(BIN)/python -m pip install -q "torch>=2.10"; \
	else \
		echo "installing torch $(TORCH) for the CPU ..."; \
		$(BIN)/python -m pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || { \
			$(BIN)/python -m pip install -q uv && \
			$(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@echo "building and installing keye_ops ..."
	@$(BIN)/python -m pip install -q -e ".[all]"
	@touch $@

# Holds the package too. The oracles' own requirements would replace torch, so they come without.
$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "building and installing keye_ops and the tools of its tests ..."
	@$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -m pip install -q --no-deps $(ORACLES)
	@touch $@ $(VENV)/.package
