# The verbs people try. Everything is installed into .venv and nothing outside of this folder.
#
#   make demo      a first run: trains on handwritten digits, samples and measures, in a few minutes on a CPU
#   make setup     the environment alone; returns at once when it is there
#   make lock      after a change of requirements*.txt: what `make setup` and `make test` install, to the file
#   make test      the tests          make lint      ruff and shellcheck
#   make test-slow, make test-gpu     tests that take minutes, and those that need a GPU
#   make test-cluster                 two hosts and a SLURM on this machine; as root on Debian or Ubuntu
#   make test-browser                 the page of tools.explorer in Chromium
#   make bench     the benchmarks, in small: one JSON line each (docs/performance.md)
#   make gpu-report MINUTES=9         what a GPU measures, most important first: benchmarks/results/
#   make cifar10   fetch CIFAR-10     make clean     remove the environment and caches (never data or runs)
#   make cifar10-latents              a small VAE of CIFAR-10, and what it makes of the images: data/cifar10_latents
#   make results   do all runs of docs/results.md that have no line yet      make figures   draw its figures
#   make evaluate-cifar10 RUN=DIR     reference statistics and a small sweep of a CIFAR-10 run

SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
UV     := 0.13.8
UV_READY := $(VENV)/.uv-$(UV)

.PHONY: help setup lock demo bench gpu-report test test-slow test-gpu test-cluster test-browser lint
.PHONY: cifar10 cifar10-latents evaluate-cifar10 results figures clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(UV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "Python 3.11 or 3.12 is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@touch $@

INSTALL := $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --require-hashes

$(READY): requirements.lock $(UV_READY)
	$(INSTALL) -r $<
	@touch $@

$(READY_DEV): requirements-dev.lock $(READY)
	$(INSTALL) -r $<
	@touch $@

# All packages with their hashes, for each platform and Python from 3.11 on. A version that a lock file names stays as
# long as the requirements allow it: without the files, the newest ones are taken. The short list follows the long one.
LOCK := UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
  --generate-hashes --no-annotate

lock: $(UV_READY)
	$(LOCK) requirements-dev.txt --output-file requirements-dev.lock
	$(LOCK) requirements.txt --constraint requirements-dev.lock --output-file requirements.lock

# 48 epochs of 28 steps; `make demo EPOCHS=96` continues. The settings are in output/demo/config.json. Two threads:
# more hardly help so small a network, and on a busy machine they wait for each other.
demo: setup
	DATASET=digits MODEL=JiT-Demo/8 BATCH_SIZE=64 EPOCHS=$${EPOCHS:-48} WARMUP_EPOCHS=1 CFG=1.5 NUM_IMAGES=500 \
	WANDB_NUM_VIS=100 ENABLE_WANDB=0 OUTPUT_DIR=output/demo OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} PYTHON=$(BIN)/python bash run_jit_multinode.sh \
	  --lr 5e-4 --ema_decay1 0.995 --ema_decay2 0.98 --num_sampling_steps 20 --eval_freq 48

# Two processes of one thread each: the tests use small tensors, and threads would wait for each other.
test: $(READY_DEV)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY_DEV)
	$(BIN)/python -m pytest -m slow

test-gpu: $(READY_DEV)
	$(BIN)/python -m pytest -m gpu

# What is missing is installed, which leaves no service of Debian's running where there is no systemd.
test-cluster: $(READY_DEV)
	@if ! type -P ip munged slurmctld slurmd >/dev/null; then \
	  if [[ $$(id -u) == 0 ]] && type -P apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -qy --no-install-recommends iproute2 slurm-wlm munge; \
	  else \
	    echo "make test-cluster needs root and the packages iproute2, slurm-wlm and munge (Debian's names)" >&2; exit 1; \
	  fi; \
	fi
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m cluster

test-browser: $(READY_DEV)
	@if ! type -P chromium >/dev/null; then \
	  if [[ $$(id -u) == 0 ]] && type -P apt-get >/dev/null; then \
	    apt-get update -q && apt-get install -qy --no-install-recommends chromium; \
	  else \
	    echo "make test-browser needs the package chromium (Debian's name)" >&2; exit 1; \
	  fi; \
	fi
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m browser

bench: setup
	@for name in step sampler checkpoint; do \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.$$name || exit; done

gpu-report: setup
	$(BIN)/python -m benchmarks.gpu_report $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REFERENCE),--reference $(REFERENCE))

# A run that has a line in experiments/results/ is not done again: move the files away to do all of them.
results: $(READY_DEV) cifar10 cifar10-latents
	@echo "All runs take about twelve hours on two cores. Interrupted, the same command goes on."
	for study in $$($(BIN)/python -c 'from experiments.studies import STUDIES; print(*(n for n, s in STUDIES.items() if s.device == "cpu"))'); do \
	  $(BIN)/python -m experiments.run $$study --processes 2 || exit; done
	$(BIN)/python -m experiments.principle
	$(BIN)/python -m experiments.few_steps
	$(BIN)/python -m experiments.figures

figures: $(READY_DEV)
	$(BIN)/python -m experiments.figures

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck -x -P SCRIPTDIR run_jit_multinode.sh .ci/run recipes/*.sh

cifar10: setup
	$(BIN)/python -m util.data.cifar10

# One thread: more wait for each other in layers so small. Ten minutes.
cifar10-latents: $(READY_DEV) cifar10
	test -f output/tiny_vae/diffusion_pytorch_model.safetensors || OMP_NUM_THREADS=1 $(BIN)/python -m experiments.tiny_vae --dataset cifar10 --out output/tiny_vae
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.prepare_data latents --vae output/tiny_vae --dataset cifar10 --no-flip \
	  --out data/cifar10_latents

# RUN is the folder of a CIFAR-10 run. Reference statistics once, then three guidance scales, then the best one.
evaluate-cifar10: setup
	@test -n "$(RUN)" || { echo "name the folder of a CIFAR-10 run: make evaluate-cifar10 RUN=output/..." >&2; exit 2; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-effnet.txt
	test -f fid_stats/cifar10_32_effnet_lite0.npz || $(BIN)/python prepare_ref.py --dataset cifar10 --extractor effnet_lite0
	RESUME=$(RUN) EVALUATE_GEN=1 NUM_IMAGES=1000 PYTHON=$(BIN)/python bash run_jit_multinode.sh \
	  --metrics fd_effnet --sweep_cfg 1.0,1.5,2.0 --sweep_images 300

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
