# Every target sets up what it needs: a virtual environment in $(VENV), pinned by constraints.txt.
#   make PYTHON=python3.12 test     another interpreter for a new environment
#   make PYTEST_ARGS="-k rope" test more arguments for pytest
#   make SEED=7 FUZZ_ARGS="-k ranges" fuzz   examples drawn from that seed, for some tests
#   make DEMO_ARGS=--json demo      more arguments for the demo
#   make gpu PYTHON=python3         run with that interpreter as it is: no environment is made, nothing is installed
#   make gpu STAGES=tests,attn=200  some stages only, attn with a share of 200 s
#   make gpu DRY=1                  every stage on the CPU with tiny shapes, results to a temporary folder
#   make gpu RESULTS=folder         results to another folder than bench/results
#   make gpu ARCHIVE=r.tgz          and all that is left in one file, kept whole while stages run
#   make gpu GPU_ARGS="--seconds 300"   more arguments of bench.gpu
#   make prime GPU_PYTHON=3.13      for a GPU machine with that Python; without a GPU, before make gpu
#   make prime PRIME_ARGS="--key triton-key.txt"    for the build of Triton whose key make gpu left there
#   make commits OF="main 0123abc" CASES=attention-dense   two commits' kernels, for python -m bench.commits on a GPU

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
OF ?= HEAD
CASES ?= attention-dense
FUZZ_ARGS ?=
SEED ?=
DEMO_ARGS ?=
# Kernels compile on the Triton of constraints.txt, and on these: what torch 2.11 and 2.14 for CUDA 13 bring.
AOT_TRITON ?= 3.6.0 3.8.0
# What a GPU run has, and is primed for.
GPU_TRITON := 3.6.0
AOT_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AOT_FOLDERS := $(AOT_TRITON:%=.aot/triton-%)
# Hosts that are tested as they are, without what they depend on; of diffusers the environment has the tested version.
HOST_FOLDERS := $(shell sed -nE 's@^ +"(vllm-omni|kernels)": "(.*)",$$@.hosts/\1-\2@p' happyhorse_fast/hosts/versions.py)
GPU_FOLDER := .aot/triton-$(GPU_TRITON)
AOT := $(BIN)/python -m bench.aot --jobs $(JOBS) $(AOT_FOLDERS:%=--also %) $(AOT_ARGS)
# One thread per worker: two workers with a thread per core each would fight over two cores.
# `pytest`, not `python -m pytest`: the latter puts the checkout first on sys.path, and `import kernels` would then find
# the folder of that name.
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/pytest -n $(JOBS) --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz sanitize aot aot-check bench prime commits gpu report lint typecheck format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## a prompt becomes a clip with sound, 8 steps on the CPU, eager beside fast
	$(BIN)/happyhorse-fast demo $(DEMO_ARGS)

test: $(STAMP) ## the tests, without the slow proofs: at most 5 minutes on 2 cores
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

check: $(STAMP) $(HOST_FOLDERS:%=%/.installed) aot-check sanitize fuzz ## the slow proofs: at most 60 minutes on 2 cores
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

fuzz: $(STAMP) ## 20 times the examples of `make test`, from a fresh seed, which it tells where one fails
	@seed=$(or $(SEED),$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')); \
	echo "fuzz: SEED=$$seed"; \
	$(PYTEST) -m "hypothesis and not gpu" --hypothesis-profile=fuzz --hypothesis-seed=$$seed $(FUZZ_ARGS) || { \
	  echo "failed with SEED=$$seed; the same examples again: make SEED=$$seed FUZZ_ARGS='-k NAME' fuzz" >&2; exit 1; }

# Planted bugs are left out: some read where they should not, which ends a sanitized run.
SANITIZED := $(addprefix tests/ops/test_cuda_,activation_quantize.py block_sparse_attention.py qk_norm_rope.py \
  rmsnorm_quantize.py select_blocks.py) $(addprefix tests/emulators/test_cuda_,async_copy.py shim.py)
SANITIZE := HAPPYHORSE_FAST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) \
  $$($${CXX:-g++} -print-file-name=libstdc++.so)"
# -s, or pytest's capture would lose what a sanitizer writes before it ends the process. The test of speed is left out,
# since instrumented code is several times slower.
sanitize: $(STAMP) ## the host module, and CUDA kernels on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZE) OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -p no:xdist -p no:cacheprovider -k "not milliseconds" \
	  tests/block_map/test_host_module.py
	$(SANITIZE) $(PYTEST) -m "not slow and not gpu" -k "not planted and not opcheck" $(SANITIZED)

aot: $(STAMP) $(AOT_FOLDERS:%=%/.installed) ## compile every kernel for every GPU, without one, and write docs/AOT.md
	$(AOT) --write

aot-check: $(STAMP) $(AOT_FOLDERS:%=%/.installed) ## compile them, and fail where docs/AOT.md differs
	$(AOT) --check

bench: $(STAMP) ## microbenchmarks of the ops: on a CPU the small cases, under 3 minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest bench/test_ops.py -p no:xdist -s --benchmark-autosave \
	  --benchmark-columns=median,iqr,rounds --benchmark-sort=fullname -q $(BENCH_ARGS)

# The GPU's machine has this Python: a cache is of one build of Triton, and its builds differ by Python.
GPU_PYTHON ?= 3.12
PRIME_ARGS ?= --build $(GPU_FOLDER)-python$(GPU_PYTHON)
prime: $(STAMP) $(GPU_FOLDER)/.installed $(GPU_FOLDER)-python$(GPU_PYTHON)/.installed ## before `make gpu`, without a GPU: compile what it launches
	PYTHONPATH=$(abspath $(GPU_FOLDER)) $(BIN)/python -m bench.prime --jobs $(JOBS) $(PRIME_ARGS)

commits: $(STAMP) $(GPU_FOLDER)/.installed $(GPU_FOLDER)-python$(GPU_PYTHON)/.installed ## what python -m bench.commits times on a GPU, made without one
	PYTHONPATH=$(abspath $(GPU_FOLDER)) $(BIN)/python -m bench.commits prepare $(OF) --cases $(CASES) --jobs $(JOBS) \
	  --build $(abspath $(GPU_FOLDER)-python$(GPU_PYTHON))

# A GPU machine may have neither a network nor a place to install into: an interpreter that is named is used as it is,
# and where there is no environment yet, so is one that has torch and pytest.
OWN := $(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(if $(filter gpu,$(MAKECMDGOALS)),$(if $(wildcard $(STAMP)),,\
  $(shell $(PYTHON) -c 'import torch, pytest' 2>/dev/null && echo $(PYTHON)))))
gpu: $(if $(OWN),,$(STAMP)) ## everything that needs a GPU, at most 9 minutes: build, tests, sampler, benchmarks
	$(or $(OWN),$(BIN)/python) -m bench.gpu $(if $(STAGES),--stages $(STAGES)) $(if $(DRY),--dry) \
	  $(if $(RESULTS),--folder $(RESULTS)) $(if $(ARCHIVE),--archive $(ARCHIVE)) $(GPU_ARGS)

report: $(STAMP) ## docs/report/ and README's generated section, from bench/results/
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.report

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP) ## mypy
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, build outputs and caches
	rm -rf $(VENV) .aot .commits .hosts .primed build dist *.egg-info .benchmarks .build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf happyhorse_fast/cubins happyhorse_fast/_C*.so
	find csrc happyhorse_fast kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment of another Python than asked for is kept: `make clean` first. One that could not be finished is removed,
# or the next run would take it for a good one.
$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: no '$(PYTHON)' found; name a Python >= 3.10 as in: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python >= 3.10 is needed, '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1);" \
	       "name another as in: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv "$(VENV)" || { \
	  rm -rf "$(VENV)"; \
	  echo "error: '$(PYTHON)' could not make a virtual environment in $(VENV);" \
	       "on Debian and Ubuntu its venv module is the package python3-venv" >&2; exit 1; }

# What the build needs comes first and from constraints.txt, so that it uses the pinned versions. When a source of csrc/
# changes the package is installed again; ninja then compiles only what that file is part of.
NATIVE := $(wildcard csrc/*.py csrc/device/*.cu csrc/device/*.cuh csrc/host/*.cpp)
$(STAMP): $(BIN)/python pyproject.toml setup.py constraints.txt $(NATIVE)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11 ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

# For its library alone, which the cache's keys depend on: it runs under another Python.
$(GPU_FOLDER)-python$(GPU_PYTHON)/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --upgrade --no-deps --only-binary :all: --python-version $(GPU_PYTHON) \
	  --target $(GPU_FOLDER)-python$(GPU_PYTHON) triton==$(GPU_TRITON)
	@touch $@

# Beside the environment, because two versions do not install in one; what comes first on PYTHONPATH is imported.
$(AOT_FOLDERS:%=%/.installed): .aot/triton-%/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --upgrade --no-deps --target .aot/triton-$* triton==$*
	@touch $@

$(HOST_FOLDERS:%=%/.installed): .hosts/%/.installed: $(STAMP)
	$(BIN)/python -m pip install -q --upgrade --no-deps --only-binary :all: --target .hosts/$* $$(echo $* | sed -E 's/-([0-9.]+)$$/==\1/')
	@touch $@
