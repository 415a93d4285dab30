# Two commands: `make demo` and `make test`. Both set everything up first, into .venv.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0+cpu torchvision==0.28.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test test-system lint lock

setup: .venv/ready

.venv/ready: pyproject.toml requirements/cpu.lock requirements/torchvision-cpu-ops/torchvision_cpu_ops.py
	@$(PYTHON) -c "import ctypes; ctypes.CDLL('libnuma.so.1')" 2>/dev/null || \
	  { echo "vLLM's CPU kernels need libnuma: apt-get install libnuma1" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv==0.13.9
	$(BIN)/pip install --quiet --no-deps $(TORCH) || \
	  $(BIN)/pip install --quiet --no-deps $(TORCH) --index-url $(TORCH_CPU_INDEX)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --no-deps -r requirements/cpu.lock -e .
	$(BIN)/python -c "import torchvision" 2>/dev/null || \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps ./requirements/torchvision-cpu-ops
	$(BIN)/python -c "import torchvision"
	touch $@

demo: setup
	$(BIN)/python -m looktwice_clients.demo

test: setup
	$(BIN)/python -m pytest

# Needs Debian's packages of .ci/system-packages.
test-system: setup
	$(BIN)/python -m pytest tests/system

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra train --extra evaluate --extra dev --python-version 3.11 \
	  --override requirements/cpu.overrides --find-links "$(PIP_FIND_LINKS)" \
	  --no-emit-find-links --no-emit-index-url --quiet --output-file requirements/cpu.lock
