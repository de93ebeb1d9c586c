# make demo    answers Spider questions with the bundled models, AR beside Jacobi
# make test    runs the tests
# make bench   runs the kernel benchmarks, writes and plots benchmarks/results/
# make gpu-check  on a machine with a GPU: builds, runs the GPU tests and the kernel benchmarks there
# make models  trains the bundled models again (needs DATA, the folder with Spider's train.jsonl, dev.jsonl and tables.json)
# Each sets up .venv by itself; python3 and g++ are all it needs.

PYTHON ?= python3
DATA ?= ../shared/data/spider
DEMO_ARGS ?=
BIN := .venv/bin
READY := .venv/ready
# What decides whether the package has to be built and installed again.
SOURCES := setup.py pyproject.toml constraints.txt cllm_kernels/ops/state_fields.py $(shell find csrc -type f)

.PHONY: demo test bench gpu-check models
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/cllm demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/pytest tests --numprocesses 2 --dist worksteal

bench: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt matplotlib
	mkdir -p benchmarks/results
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/kernels_cpu.json
	$(BIN)/python benchmarks/plot.py benchmarks/results/kernels_cpu.json

gpu-check:
	scripts/gpu_check.sh

models: $(READY)
	$(BIN)/cllm-train spider --data $(DATA)

# torch first and by exact version: a range would take the newest build.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,test]"
	touch $@
