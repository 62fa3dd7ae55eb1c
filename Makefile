# make train | test | lint | bench | setup | clean     FFCV=0 leaves FFCV out (remembered)     ARGS="..." to the script
PYTHON ?= python3
FFCV ?=
CONFIG ?= launch/configs/digits.yaml
ARGS ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup train test lint bench clean

setup:
	@PYTHON="$(PYTHON)" FFCV="$(FFCV)" sh launch/setup.sh

train: setup
	deepspeed launch/train.py --config $(CONFIG) $(ARGS)

test: setup
	python -m pytest $(ARGS)

lint: setup
	ruff check .
	ruff format --check .

bench: setup
	python benchmarks/train_step.py --model resnet8
	python benchmarks/train_step.py --model wrn10_2 --batch-size 64 --rounds 5
	python benchmarks/loader.py
	python benchmarks/checkpoint.py

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
