# `make demo` and `make test` need Python >= 3.10 with venv, and nothing else.
# They make an environment of their own in .venv and build what this machine can build.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
ORACLES := keye-vl-utils==1.5.2 einops==0.8.2 opencv-python-headless==5.0.0.93 nvidia-cutlass==4.2.0.0
CUTLASS := $(filter nvidia-cutlass%,$(ORACLES))
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') \
	$(wildcard python_tests/*.cpp)
SELFTEST_KERNELS := gemm_mma gemm_wgmma cluster_sum row_sums

.PHONY: demo test sanitize arm64 faults mutation mutation-attention ledger lint format bench clean

demo: $(VENV)/.package
	$(BIN)/keye-ops demo $(ARGS)

# In as many processes as there are cores; ARGS="-n 0" runs them in one.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# The CPU library once more, with the address and undefined behaviour sanitizers.
sanitize: $(VENV)/.dev
	$(BIN)/python python_tests/sanitize.py $(ARGS)

# Compiles the CPU library for arm64. There is no torch to link it with, so "true" is the linker.
# Debian's Python.h looks for its settings in a folder named after the target: any will do.
arm64: $(VENV)/.torch
	mkdir -p build/arm64
	ln -sfn /usr/include/$$(g++ -dumpmachine) build/arm64/aarch64-linux-gnu
	torch=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') && \
	python=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])') && \
	cmake -S . -B build/arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS=-Werror \
		"-DCMAKE_CXX_CREATE_SHARED_LIBRARY=<CMAKE_COMMAND> -E true" -DKEYE_TORCH_LIB="$$torch/lib" \
		-DKEYE_TORCH_INCLUDE="$$torch/include" -DKEYE_PYTHON_INCLUDE="$$python"
	cmake --build build/arm64 --parallel 2

# Every planted fault, as the host executor reports it; writes the table.
faults: $(VENV)/.dev
	$(BIN)/python python_tests/planted_faults.py --report csrc/host_executor/FAULTS.md $(ARGS)

# Source mutants of the CUDA kernels: at least 95 % of them must be noticed.
mutation: $(VENV)/.dev
	$(BIN)/python python_tests/host_cuda.py
	$(BIN)/python python_tests/mutation/run.py --at-least 60 \
		--sources csrc/rope/rope.cuh csrc/linear_gelu/linear_gelu.cuh csrc/patch_embed/patch_embed.cuh \
		csrc/patchify/patchify.cuh csrc/merge_norm/merge_norm.cuh csrc/common/norm_row.cuh \
		csrc/common/added_rows.cuh csrc/common/vec.cuh csrc/host_executor/selftest/*.cuh \
		--test "host_cuda_rope.so:$(BIN)/python python_tests/fault_probe.py --strict rope" \
		--test "host_cuda_linear_gelu.so:$(BIN)/python python_tests/fault_probe.py --strict linear_gelu" \
		--test "host_cuda_patch_embed.so:$(BIN)/python python_tests/fault_probe.py --strict patch_embed" \
		--test "host_cuda_patchify.so:$(BIN)/python python_tests/fault_probe.py --strict patchify" \
		--test "host_cuda_merge_norm.so:$(BIN)/python python_tests/fault_probe.py --strict merge_norm" \
		--test "host_cuda_add_layer_norm.so:$(BIN)/python python_tests/fault_probe.py --strict add_layer_norm" \
		--test "host_cuda_add_rms_norm.so:$(BIN)/python python_tests/fault_probe.py --strict add_rms_norm" \
		--test "host_cuda_selftest.so:$(BIN)/python python_tests/fault_probe.py --strict $(SELFTEST_KERNELS)" \
		--equivalent python_tests/mutation/equivalent.json \
		--json build/mutation.json --report build/mutation.md $(ARGS)

# The same of attention's kernels, which take longer to compile and to run.
mutation-attention: $(VENV)/.dev
	$(BIN)/python python_tests/host_cuda.py
	$(BIN)/python python_tests/mutation/run.py --at-least 100 --sample 104 \
		--sources csrc/varlen_attention/*.cuh \
		--test "host_cuda_varlen_attention.so:$(BIN)/python python_tests/varlen_attention_probe.py" \
		--equivalent python_tests/mutation/equivalent_attention.json \
		--json build/mutation_attention.json --report build/mutation_attention.md $(ARGS)

# Registers, spills and instructions of every CUDA kernel, as checked in.
ledger: $(VENV)/.dev
	$(BIN)/python python_tests/cuda_ledger.py $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/keye-ops bench $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python python_tests/kernel_tidy.py

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
	@# The headers of fused GEMMs; its requirements are those of tools that we do not use.
	@if command -v nvcc >/dev/null || [ -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then \
		$(BIN)/python -m pip install -q --no-deps $(CUTLASS); \
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
