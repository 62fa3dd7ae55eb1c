# make train | test | test-faults | lint | bench | gpu-check | setup | clean     FFCV=0 leaves FFCV out (remembered)     ARGS="..." to the script
PYTHON ?= python3
FFCV ?=
CONFIG ?= launch/configs/digits.yaml
ARGS ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test test-faults lint bench gpu-check clean

setup:
	@PYTHON="$(PYTHON)" FFCV="$(FFCV)" sh launch/setup.sh

train: setup
	deepspeed launch/train.py --config $(CONFIG) $(ARGS)

test: setup
	@sh launch/setup_cluster.sh
	@sh tests/browser.sh
	python -m pytest $(ARGS)

# Twenty kills at random steps; `test` has four.
test-faults: setup
	FAULTS_KILLS=20 python -m pytest tests/launch/test_faults.py tests/launch/test_submit.py -k "killed or twice" $(ARGS)

lint: setup
	ruff check .
	ruff format --check .

bench: setup
	python benchmarks/train_step.py --model resnet8
	python benchmarks/train_step.py --model wrn10_2 --rounds 5
	python benchmarks/film_dual_bn.py
	python benchmarks/loader.py
	python benchmarks/checkpoint.py

# Installs nothing: the machines that have a GPU may have no network.
gpu-check:
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
