# make quickstart   train a draft and a verifier on the embedded pair, then measure PARSE against the target alone
# make restaurants  the same for a real chat model and people's language, in more than an hour
# make restaurants-eval  evaluates the draft and the verifier of that run, which are shipped
# make serve        the run of `make quickstart` behind an OpenAI-compatible server, at 127.0.0.1:8000
# make test         the tests that take minutes together
# make slow         those that take longer: the whole chain, kills, two processes, real models
# make test-vllm    the tests on a real vLLM server, which goes into .venv-vllm: 4 GB, minutes
# make smollm2      a real chat model of 135M parameters as a folder, .venv/SmolLM2-135M-Instruct.Q4_1
# make lint         formatting, lint, types
# make gpu          what only a GPU can show, in nine minutes: a table, and a JSON file in OUT (docs/results)
# make results      docs/results.md out of the files in docs/results; RUNS="runs/NAME ..." adds those runs to them first
# make docs         the guides as a site, in site/
# Each sets up .venv by itself, once. With COVER=1 both kinds of tests take half as long again, and tell what of the code
# they run, and fail where that is too little.

PYTHON ?= python3
BIN := .venv/bin
COVER ?=
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE  # without it every start compiles the libraries again: seconds

.PHONY: quickstart restaurants restaurants-eval smollm2 serve test slow test-vllm lint gpu results docs clean

TRAIN := $(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $$(getconf _NPROCESSORS_ONLN) --config_file recipes/accelerate/one_process.yaml -m train
SHIPPED := recipes/models/restaurants

quickstart: .venv/run.stamp
	$(TRAIN) recipes/quickstart.yaml
	$(BIN)/python -m eval recipes/quickstart.yaml

restaurants: .venv/smollm2.stamp
	$(TRAIN) recipes/restaurants.yaml
	$(BIN)/python -m eval recipes/restaurants.yaml

restaurants-eval: .venv/smollm2.stamp
	$(BIN)/python -m eval recipes/restaurants.yaml name=restaurants-shipped eval.draft=$(SHIPPED)-distilled \
	  eval.verifier=$(SHIPPED)-verifier eval.prompts=150 'eval.concurrency=[1]'

serve: .venv/serve.stamp
	$(BIN)/python -m parse serve --run runs/quickstart

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(if $(COVER),--cov --cov-report= --cov-fail-under=80)

slow: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow $(if $(COVER),--cov --cov-append --cov-report=term:skip-covered)

test-vllm: .venv/dev.stamp .venv/smollm2.stamp .venv-vllm/stamp
	$(BIN)/python -m pytest -m slow tests/test_vllm.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# straight from the sources, with the Python at hand where nothing is installed here
OUT ?= docs/results
gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m eval.bench gpu --out $(OUT) $(if $(RUN),--run $(RUN))

docs: .venv/docs.stamp
	$(BIN)/python -m recipes.reference
	$(BIN)/mkdocs build --quiet --strict

.venv/docs.stamp: .venv/run.stamp
	PYTHON=$(PYTHON) bash install.sh docs
	touch $@

results: .venv/run.stamp
	$(BIN)/python -m eval.results $(RUNS)

clean:
	rm -rf .venv .venv-vllm runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

.venv/run.stamp: pyproject.toml constraints.txt install.sh
	PYTHON=$(PYTHON) bash install.sh
	touch $@

smollm2: .venv/smollm2.stamp

.venv/smollm2.stamp: .venv/run.stamp
	PYTHON=$(PYTHON) bash install.sh model
	$(BIN)/python -c "from eval.bench.models import load_smollm2; load_smollm2()"
	touch $@

.venv/serve.stamp: .venv/run.stamp
	PYTHON=$(PYTHON) bash install.sh serve
	touch $@

.venv-vllm/stamp: .venv/run.stamp install.sh
	PYTHON=$(PYTHON) bash install.sh vllm
	touch $@

.venv/dev.stamp: .venv/run.stamp
	PYTHON=$(PYTHON) bash install.sh dev
	touch $@
