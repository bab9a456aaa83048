# make setup | serve | test | long | lint | docs | conformance | fuzz | reliability | bench | demo-data | demo-model | demo-masks
#      smollm2-data | smollm2-masks | image | vllm | cluster
.PHONY: setup serve test long lint docs conformance fuzz reliability bench demo-data demo-model demo-masks smollm2-data smollm2-masks image vllm cluster
PORT ?= 8000
BIN := .venv/bin
DEMO := server/masquerade/demo
SMOLLM2 := server/masquerade/smollm2

setup: .venv/ready

.venv/ready: pyproject.toml clients/python/pyproject.toml constraints.txt hatch_build.py $(wildcard server/masquerade/kernels/cpp/*)
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]' -e clients/python
	@touch $@

serve: MODEL = demo
serve: setup
	@echo "serving $(MODEL); for $(if $(filter demo,$(MODEL)),smollm2 (93 MB; fetched once),the demo (no download)): make serve MODEL=$(if $(filter demo,$(MODEL)),smollm2,demo)"
	$(BIN)/masquerade serve --model $(MODEL) --port $(PORT)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@for folder in server maskstore clients; do test ! -e $$folder/__init__.py || { echo "$$folder is no package"; exit 1; }; done

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What takes minutes: Ray clusters, upgrades under load, a build on SmolLM2 over HTTP; and the kernels under sanitizers
long: setup
	$(BIN)/pytest --long -m long

docs: setup
	$(BIN)/python -m masquerade.app > docs/api.md

# Other people's clients against a real server, each in an environment of its own under .conformance; MODEL=smollm2 too
conformance: setup
	$(BIN)/python -m tests.conformance.run --model $(MODEL)

# At least 5000 requests that are made from the OpenAPI description
fuzz: setup
	$(BIN)/python -m tests.fuzzing.run --examples 200

# At most 45 minutes; writes its tables into the page
reliability: setup
	$(BIN)/python -m tests.reliability.run --record docs/reliability.md

bench: setup
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.maskstore
	$(BIN)/python -m benchmarks.kernels

# A Ray cluster of one node: a deployment, and its upgrade under load; the tests of one server, served by two replicas
cluster: setup
	$(BIN)/pytest --long tests/cluster
	$(BIN)/pytest --replicas 2 tests/contract tests/client tests/web

# The plugin of vLLM, in an environment of its own (3.4 GB), on a CPU; beside the engine of .venv if it is there
vllm: setup .vllm/ready
	$(BIN)/mypy --config-file contrib/vllm/pyproject.toml contrib/vllm/vllm_masquerade
	OMP_NUM_THREADS=1 .vllm/bin/python -m pytest -c contrib/vllm/pyproject.toml contrib/vllm/tests

.vllm/ready: contrib/vllm/pyproject.toml contrib/vllm/install-cpu.sh maskstore/pyproject.toml $(wildcard maskstore/maskstore/*.py)
	contrib/vllm/install-cpu.sh .vllm
	@touch $@

# The demo: its text, its model and its personas, in this order. Each is made from the one before.
demo-data: setup
	$(BIN)/python -m masquerade.demo.calibration

demo-model: setup
	$(BIN)/python -m masquerade.demo.train --out $(DEMO)/model

demo-masks: setup
	@store=$$(mktemp -d) && for pair in introvert:extravert power_averse:power_seeking formal:casual gloomy:cheerful; do \
	  own=$${pair%%:*} other=$${pair##*:} && OMP_NUM_THREADS=1 $(BIN)/masquerade build --model demo --store $$store \
	    --name $$own --data $(DEMO)/data/$$own.train.jsonl --validation $(DEMO)/data/$$own.heldout.jsonl \
	    --contrast-name $$other --contrast $(DEMO)/data/$$other.train.jsonl \
	    --contrast-validation $(DEMO)/data/$$other.heldout.jsonl \
	    --neutral $(DEMO)/data/facts.jsonl --score attribution --rho 0.003 --phase all --out $(DEMO)/personas || exit 1; done; rm -r $$store

# The personas of smollm2: their text, and their masks, which take an hour of one core
smollm2-data: setup
	$(BIN)/python -m masquerade.smollm2.calibration

smollm2-masks: setup
	@store=$$(mktemp -d) && for pair in introvert:extravert casual:formal cheerful:grumpy storyteller:plain; do \
	  own=$${pair%%:*} other=$${pair##*:} && OMP_NUM_THREADS=1 $(BIN)/masquerade build --model smollm2 --store $$store \
	    --name $$own --data $(SMOLLM2)/data/$$own.train.jsonl --validation $(SMOLLM2)/data/$$own.heldout.jsonl \
	    --contrast-name $$other --contrast $(SMOLLM2)/data/$$other.train.jsonl \
	    --contrast-validation $(SMOLLM2)/data/$$other.heldout.jsonl \
	    --out $(SMOLLM2)/personas || exit 1; done; rm -r $$store

# docker/verify tries out what this has built; docker/README.md says how to go about GPUs. OFFLINE is a command that builds
# a Dockerfile where there is neither an engine nor a registry of images.
OFFLINE ?= ../shared/scripts/image-offline
MODEL ?= demo
image:
	@if docker info >/dev/null 2>&1; then \
	  docker build --build-arg MODEL=$(MODEL) --build-arg REVISION=$$(git rev-parse HEAD) --tag masquerade --tag masquerade:cpu .; \
	elif test -x $(OFFLINE); then \
	  $(OFFLINE) build . --tag masquerade -- --build-arg TORCH_INDEX= --build-arg PIP_FIND_LINKS \
	    --build-arg PIP_EXTRA_INDEX_URL --build-arg MODEL=$(MODEL) --build-arg REVISION=$$(git rev-parse HEAD); \
	else echo "make image needs a Docker engine that runs: \`docker info\` says what is wrong"; exit 1; fi
