# What a laptop does and what CI does, by the same names.  Needs python3 (3.11 or newer) and a C++20 compiler; the rest
# comes into $(VENV).  `make run` brings the core and [schema]; `make setup` brings [dev], [train] (torch) and [cloud] as well.

PYTHON ?= python3
VENV ?= .venv
# A machine without a GPU saves a lot with PyTorch's own index: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TEXT ?= turn off the kitchen lights in ten minutes
MODEL ?= nano
BUDGET ?= 2h
FUZZ_SECONDS ?= 600
MINUTES ?= 20
TOKENS ?= 10000

PY := $(VENV)/bin/python
NEARFAR := $(VENV)/bin/nearfar
CMAKE := $(VENV)/bin/cmake
CONFIGURE := $(CMAKE) -S native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DNEARFAR_TESTS=ON
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := $(shell find native -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt -o -name '*.cmake')
CXX_FILES := $(shell find native -name '*.cc' -o -name '*.h')
ifneq ($(TORCH_INDEX),)
export PIP_EXTRA_INDEX_URL := $(TORCH_INDEX)
endif

.PHONY: help run setup check test proto native sanitize sanitize-thread emulate fuzz soak chaos bench bench-roofline bench-peers bench-busy train eval pack-study clean

help:
	@echo "make run        set up and let the shipped model handle a request (TEXT='...' for your own)"
	@echo "make test       set up for development and run every test"
	@echo "make setup      only the set-up: [dev], [train] and [cloud] extras, compiled extension"
	@echo "make check      ruff, mypy --strict, clang-format"
	@echo "make proto      the code of the protocol between two machines, out of sdk/nearfar/wire/nearfar.proto"
	@echo "make native     rebuild the C++ engine and run its own tests (needs doctest)"
	@echo "make sanitize   the C++ tests under address and undefined-behaviour sanitizers (needs doctest)"
	@echo "make sanitize-thread   the C++ tests of threads under the thread sanitizer (needs doctest)"
	@echo "make emulate    the C++ tests on CPUs that this machine is not, under qemu (needs a cross compiler)"
	@echo "make fuzz       FUZZ_SECONDS=600 of fuzzing the GGUF reader, as long the panel files, as long the messages of the wire"
	@echo "make soak       MINUTES=20 of a server under everything that clients do, and what is left of it"
	@echo "make chaos      TOKENS=10000 of MODEL=nano from two machines, compared with the oracle, while everything fails"
	@echo "make bench      the figures of docs/benchmarks.md"
	@echo "make bench-roofline, bench-peers, bench-busy   the machine's limits and docs/roofline.svg; llama.cpp; a busy machine"
	@echo "make train      BUDGET=2h: train nano from DATA=folder"
	@echo "make eval       the task figures of MODEL=nano on DATA=folder"
	@echo "make pack-study   BUDGET=10m: one training for many file sizes, against others, on DATA=folder"
	@echo "make clean      remove $(VENV) and build/"

run: $(VENV)/ready
	@$(NEARFAR) run "$(TEXT)"
	@if [ -t 0 ]; then $(NEARFAR) run; else echo "Your own request:  $(NEARFAR) run \"is the front door locked\""; fi

setup: $(VENV)/dev

check: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

# A file's tests stay together, in order: they share models and servers.
test: $(VENV)/dev
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

proto: $(VENV)/dev
	$(PY) -m grpc_tools.protoc -I sdk --python_out=sdk --pyi_out=sdk sdk/nearfar/wire/nearfar.proto

native: $(VENV)/ready
	$(CONFIGURE) -B build/native -DCMAKE_BUILD_TYPE=Release
	$(CMAKE) --build build/native -j 2
	$(VENV)/bin/ctest --test-dir build/native --output-on-failure

sanitize: $(VENV)/ready
	$(CONFIGURE) -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNEARFAR_SANITIZE=address,undefined
	$(CMAKE) --build build/sanitize -j 2
	$(VENV)/bin/ctest --test-dir build/sanitize --output-on-failure

# The tests that share memory between threads; the others would take minutes and find nothing.
sanitize-thread: $(VENV)/ready
	$(CONFIGURE) -B build/sanitize-thread -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNEARFAR_SANITIZE=thread
	$(CMAKE) --build build/sanitize-thread -j 2
	build/sanitize-thread/nearfar_tests -tc='*thread*,*chunk*,*section*,*exception*,*fork*,*holder*'

emulate: $(VENV)/dev
	$(PY) -m pytest --slow --numprocesses auto --maxprocesses 4 --dist worksteal tests/native/test_emulation.py

fuzz: $(VENV)/dev
	$(PY) tests/fuzz/fuzz_gguf.py --seconds $(FUZZ_SECONDS)
	$(PY) tests/fuzz/fuzz_panels.py --seconds $(FUZZ_SECONDS)
	$(PY) tests/fuzz/fuzz_wire.py --seconds $(FUZZ_SECONDS)

soak: $(VENV)/dev
	$(PY) bench/soak.py --minutes $(MINUTES)

chaos: $(VENV)/dev
	$(NEARFAR) chaos suite $(MODEL) --tokens $(TOKENS)

bench: $(VENV)/dev
	$(NEARFAR) bench $(MODEL)
	for script in bench/start_up.py bench/start_up_large.py bench/memory.py bench/installed_size.py; do $(PY) $$script || exit 1; done

bench-roofline: $(VENV)/dev
	$(NEARFAR) bench roofline --json > docs/roofline.jsonl
	$(PY) bench/plot_roofline.py docs/roofline.jsonl docs/roofline.svg

bench-peers: $(VENV)/dev
	$(PY) bench/peers.py

bench-busy: $(VENV)/dev
	$(PY) bench/busy.py

train: $(VENV)/dev
	$(NEARFAR) train nano --budget $(BUDGET) $(if $(DATA),--data $(DATA))

eval: $(VENV)/dev
	$(NEARFAR) eval $(MODEL) $(if $(DATA),--data $(DATA))

pack-study: $(VENV)/dev
	$(PY) -m nearfar_cloud.training.multi.study --budget $(BUDGET) $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) build

# -- stamps -----------------------------------------------------------------------------------------------------------

$(VENV)/tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nearfar needs Python 3.11 or newer: make PYTHON=...")'
	@$(PYTHON) -c 'import os, sys, sysconfig; h = sysconfig.get_path("include") + "/Python.h"; \
	  sys.exit(not os.path.exists(h) and f"{h} is missing: install Python with its headers (Debian: python3-dev)")'
	@command -v "$${CXX:-c++}" >/dev/null || { echo "nearfar needs a C++20 compiler (g++ 12, clang 16 or newer)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core nanobind cmake ninja
	@touch $@

# Without build isolation nanobind keeps its path, so that the next build is incremental.
$(VENV)/ready: pyproject.toml $(NATIVE) | $(VENV)/tools
	$(PIP) --no-build-isolation --editable '.[schema]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/ready
	$(PIP) --no-build-isolation --editable '.[dev,train,cloud]'
	@touch $@
