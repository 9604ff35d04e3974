# make play | demo | smoke | test | setup | check | test-engines, -faults, -multinode, -docker, -s3, -encode, -doctor, -plan, -fuzz: see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready

export PATH := $(BIN):$(PATH)
# The CPU build of torch spins in its barriers; on shared cores waiting passively is several times faster.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0
# DeepSpeed compiles one small C++ extension; kept here, no stale lock of another project can block it.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PYTHONWARNINGS := ignore

.PHONY: play demo smoke test test-engines test-faults test-multinode test-docker test-s3 test-encode test-doctor test-plan test-fuzz check setup clean

# The world that `make play` plays: the one that comes with the repository, or WORLD=runs/demo/causal.
WORLD ?= sampling/worlds/hall

play: setup
	@test -d "$(WORLD)" || { echo "No world $(WORLD): make demo trains one, then make play WORLD=runs/demo/causal"; exit 2; }
	@python -m sampling play "$(WORLD)" browser=true

demo: setup
	@python -m launch pipeline configs/pipelines/demo.yaml

smoke: setup
	@python -m launch pipeline configs/pipelines/smoke.yaml

# Two files of tests at a time; most of them wait for processes that they started.
test: check
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

test-engines: setup
	@python -m pytest -m long -s tests/test_engines.py tests/test_muon.py tests/test_nonfinite.py

test-faults: setup
	@python -m pytest -m long -s tests/test_faults.py

test-multinode: setup
	@python -m pytest -m long -s tests/test_multinode.py tests/test_slurm.py

test-docker: setup
	@python -m pytest -m long -s tests/test_docker.py

# Starts Ceph's S3 gateway and stops it (without Ceph an emulator); the short ones of these are part of `make test`.
test-s3: setup
	@python -m pytest -m "" tests/test_storage.py tests/test_s3_faults.py tests/test_s3_places.py tests/test_s3_training.py

test-encode: setup
	@python -m pytest -m long -s tests/test_encode_workers.py tests/test_bad_recordings.py

test-doctor: setup
	@python -m pytest -m long -s tests/test_recordings_doctor.py

test-plan: setup
	@python -m pytest -m long -s tests/test_plan.py

# Ten minutes of damaged and hostile files and words, others each time; a minute of it is part of `make test`.
test-fuzz: setup
	@OMP_NUM_THREADS=1 python tests/fuzz.py seconds=600

check: setup
	@ruff check . && ruff format --check . && pyright

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 setup"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv is missing: install python3-venv"; exit 2; }
	@command -v c++ >/dev/null || { echo "A C++ compiler is missing (DeepSpeed needs one): install g++"; exit 2; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| { echo "Python's headers are missing (DeepSpeed compiles against them): install python3-dev"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,play,dev]'
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/*/lock
	@echo "compiling DeepSpeed's CPU communication (once, up to a minute)"
	@DS_ACCELERATOR=cpu python -c 'from deepspeed.accelerator import get_accelerator; \
		get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)'
	@touch $@

clean:
	rm -rf $(VENV) runs
