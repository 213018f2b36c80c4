# make setup | test | demo | doctor | lint | clean.  Each does all its own set-up; `make setup EXTRA=gpu` for CUDA.
EXTRA ?= cpu
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
export RAY_worker_niceness ?= 0
export RAY_USAGE_STATS_ENABLED = 0
export VLLM_NO_USAGE_STATS = 1
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

.PHONY: setup test demo doctor lint clean

setup:
	@bash launch/setup.sh $(EXTRA)

test: lint
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: setup
	rm -rf runs/demo
	$(PY) -m launch.train experiment=tiny_grpo run_dir=runs/demo

doctor: setup
	$(PY) -m launch.doctor

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
