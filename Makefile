# Needs make and Python 3.11 or newer. All else is installed into .venv. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What `make report` reads.
FOLDER ?= outputs
DEMO := outputs/demo
# The runs that `make playground` shows.
PLAYGROUND ?= results/runs/mnist/fast_indrnn/seed0 results/runs/mnist/fast_lstm_chrono/seed0

.DEFAULT_GOAL := help
.PHONY: help install demo speedrun gpu verify test test-all lint format docs wheel report playground clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY)  ## create .venv with all dependencies

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## IndRNN against LSTM in minutes, on a 5,000-image subset of MNIST; ARGS="overwrite=true" reruns
	$(BIN)/indrnn-train -m experiment=demo model=indrnn,lstm,lstm_chrono seed=0 output_root=$(DEMO) $(ARGS)
	$(BIN)/indrnn-report $(DEMO) --inspect $(foreach model,indrnn lstm lstm_chrono,$(DEMO)/mnist5k/demo_$(model)/seed0)
	@echo
	@echo "With 800 updates each, a network must carry the first pixels to the last step to tell the digits apart. The IndRNN"
	@echo "does so from the start, the LSTM only if its forget gates start open (chrono initialization)."
	@echo "This was mnist5k, 5,000 images (3,500 train, 500 validation, 1,000 test): these are not MNIST accuracies."
	@echo "Open $(DEMO)/report/report.html, or run tensorboard --logdir $(DEMO). Try next, in two minutes each:"
	@echo "  indrnn-train experiment=demo output_root=outputs/next model.num_layers=1 tag=one-layer"
	@echo "  (or model.last_layer_min=false tag=no-range, model.gamma=1 tag=gamma1, optimizer=muon tag=muon,"
	@echo "  data=adding data.length=200), then indrnn-report $(DEMO) outputs/next; make speedrun for all of MNIST."

speedrun: $(READY)  ## time the fast protocol for three seeds on a quiet machine (results/speedrun.md); ARGS="trainer.precision=bfloat16"
	for seed in 0 1 2; do uptime && bash -c "time $(BIN)/indrnn-train experiment=fast model=indrnn tag=speedrun \
		output_root=outputs/speedrun overwrite=true seed=$$seed $(ARGS)" || exit 1; done
	$(BIN)/indrnn-report outputs/speedrun

gpu:  ## run everything that needs a CUDA GPU in nine minutes, into OUT=build/gpu; without .venv it uses PYTHON
	@OUT="$(OUT)" $(firstword $(wildcard $(BIN)/python) $(PYTHON)) scripts/gpu.py

verify: $(READY)  ## re-evaluate the committed weights and compare with their results; ARGS="--data-root FOLDER"
	$(BIN)/indrnn-eval results/runs $(ARGS)

test: WHICH := -m "not slow"  ## run the tests: a few minutes on two cores
test-all: WHICH :=  ## run the slow tests too
# The second call runs the Triton kernels in Triton's interpreter, without a GPU.
test test-all: $(READY)
	$(BIN)/python -m pytest -n 2 $(WHICH)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(WHICH) tests/test_triton.py

lint: $(READY)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the source with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## build the API reference into build/docs
	@$(BIN)/python -c "import pathlib, indrnn, pdoc; \
		vars(indrnn).update({name: getattr(indrnn, name) for name in indrnn.__all__}); \
		pdoc.render.configure(docformat='google'); \
		pdoc.pdoc('indrnn', 'indrnn.layers', 'indrnn.recurrence', output_directory=pathlib.Path('build/docs'))"
	@echo "build/docs/index.html"

wheel: $(READY)  ## build the sdist and the wheel into dist
	$(BIN)/python -m build --no-isolation

report: $(READY)  ## write tables and figures of the runs in FOLDER=outputs
	$(BIN)/indrnn-report $(FOLDER)

playground: $(READY)  ## write results/playground.html from the published runs; ARGS="--data-root FOLDER"
	$(BIN)/indrnn-report --playground $(PLAYGROUND) --out results/playground.html $(ARGS)

clean:  ## remove caches and builds
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too; data and run folders stay
	rm -rf $(VENV)
