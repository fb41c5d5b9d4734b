# `make` lists the targets. Each creates .venv on first use; PYTHON=... picks the interpreter for it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all bench results figures verify lint diff loc

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check pytest pytest-xdist hypothesis ruff scikit-learn safetensors pycocotools
	@touch $@

demo: .venv/run  ## train SwAV on embedded images, k-NN before and after: two minutes on two CPU cores
	$(BIN)/python swav.py --out runs/demo --fresh --log-every 156
	$(BIN)/python eval_knn.py runs/demo --random-init
	$(BIN)/python eval_knn.py runs/demo

test: .venv/dev lint  ## lint and tests, CPU only, no network: eight minutes on two cores
	$(BIN)/python -m pytest -n 2

test-all: .venv/dev lint  ## all CPU tests, with the slow sweeps
	$(BIN)/python -m pytest -n 2 -m "not gpu"

.venv/bench: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check lightly==1.6.0 faiss-cpu scikit-learn pot webdataset
	@touch $@

bench: .venv/bench  ## compare with lightly, faiss, scikit-learn, POT; PHOTOS=folder adds the input pipeline (results in benchmarks/results)
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.kmeans
	$(BIN)/python -m benchmarks.pca
	$(BIN)/python -m benchmarks.sinkhorn
	$(BIN)/python -m benchmarks.odc_memory
	$(BIN)/python -m benchmarks.scale
	$(if $(PHOTOS),$(BIN)/python -m benchmarks.pipeline --data $(PHOTOS),@echo "make bench PHOTOS=folder also measures the input pipeline")

results: .venv/bench  ## compare all methods and write the table of docs/results.md, takes hours: DATA=folder or list, ROOT=, VAL= (default: cifar10)
	$(BIN)/python -m benchmarks.methods $(if $(DATA),--data $(DATA)) $(if $(ROOT),--root $(ROOT)) $(if $(VAL),--val $(VAL))

figures: .venv/run  ## measure what breaks the methods and what SwAV costs, draw the pictures of docs/methods.md, takes hours
	$(BIN)/python -m benchmarks.ablations
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m benchmarks.ablations --precision float32 --out runs/ablations_float32
	$(BIN)/python -m benchmarks.multicrop
	$(BIN)/python -m benchmarks.figures --runs runs

verify: .venv/run  ## compare released weights with their published figures: IMAGENET=folder LIMIT=images
	$(BIN)/python -m benchmarks.verify --data $(IMAGENET) $(if $(LIMIT),--limit $(LIMIT))

lint: .venv/dev
	$(BIN)/ruff check .

diff:  ## count the lines that differ between neighbouring methods, ignoring white space
	@set -- swav selav2  selav2 deepclusterv2  deepclusterv2 deepcluster  deepcluster odc  deepcluster sela; while [ $$# -gt 0 ]; do \
	  printf '%s -> %s: ' $$1.py $$2.py; diff -w $$1.py $$2.py | grep -c '^[<>]'; shift 2; done

loc: .venv/run  ## compare each file's number of lines with its budget
	@$(BIN)/python -m benchmarks.loc
