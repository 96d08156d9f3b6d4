# One command sets everything up in .venv and does the job; the second time set-up is skipped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU ?= auto
RESULTS := benchmarks/results
REAL_RUNS := tests/real_runs
OLDEST := .venv-457

# Without this, torch's and bitsandbytes' thread pools can spin against each other on a loaded machine (docs/log.md).
export GOMP_SPINCOUNT ?= 3000

.PHONY: fit test test-trainers check lint gpu-fit gpu-memory gpu-search gpu-run probe-cost kill-fit clean

fit: $(VENV)/.installed
	$(BIN)/autotune fit --gpu $(GPU)

test: $(VENV)/.installed-test $(OLDEST)/.installed
	$(BIN)/python -m pytest

# axolotl and LLaMA-Factory, each in its own environment (4.3 and 2.3 GB): recovered once each.
test-trainers: $(VENV)/.installed-test .venv-axolotl/.installed .venv-llamafactory/.installed
	$(BIN)/python -m pytest $(REAL_RUNS)/other_trainers.py

check: lint test

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Llama-3-8B's shape at four memory limits, on a real GPU; raw JSON under benchmarks/results/.
gpu-fit: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_fit --output $(RESULTS)

# Predicted beside measured, config by config, three models; raw JSON and an allocator history under benchmarks/results/.
gpu-memory: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_memory --gpu $(GPU) --output $(RESULTS)

# Landscapes of Llama-3-8B's shape, searches replayed on them, fits live, others' settings; the same again goes on.
gpu-search: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_search --gpu $(GPU) --output $(RESULTS)

# A run of Llama-3-8B's shape that a late long sample breaks under 12 GiB, undisturbed and recovered; raw JSON.
gpu-run: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_run --gpu $(GPU) --output $(RESULTS)

probe-cost: $(VENV)/.installed
	$(BIN)/python -m benchmarks.probe_cost --output $(RESULTS)

kill-fit: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.kill_fit --output $(RESULTS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	touch $@

# The oldest transformers that is supported, in an environment of its own, for the real runs among the tests.
$(OLDEST)/.installed: $(REAL_RUNS)/constraints-457.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $< \
		torch transformers trl peft datasets accelerate bitsandbytes
	touch $@

# torchvision and torchaudio of a registry are built for CUDA and break imports under a torch for the CPU.
.venv-axolotl/.installed .venv-llamafactory/.installed: .venv-%/.installed: $(REAL_RUNS)/constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c $< torch $* bitsandbytes
	.venv-$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

clean:
	rm -rf $(VENV) .venv-*
