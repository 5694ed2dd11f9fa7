# Everything happens in a virtual environment that the first target to need it makes.
# Needs: make, python3 (3.11 or later) with venv. Targets: make help.

PYTHON3 ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.stamp-dev

FUZZ_TIMES ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench dev interop postcopy unit conformance fault faults features fuzz coverage schemas qemu qemu-arm clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(STAMP) qemu ## move a running guest QEMU -> migrationd -> QEMU and watch it
	$(BIN)/migrationctl demo

test: $(STAMP) qemu qemu-arm ## unit, conformance, interop (installed QEMU), fault and fuzz tests
	$(BIN)/pytest

check: $(STAMP) ## format, lint, types, layers, schema drift
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m migrationd.qmp.schema --check

format: $(STAMP) ## rewrite the sources as check wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: $(STAMP) ## unit tests alone: a minute or two
	$(BIN)/pytest tests/unit

conformance: $(STAMP) ## recorded QEMU streams alone
	$(BIN)/pytest tests/conformance

interop: $(STAMP) qemu qemu-arm ## the full matrix over every QEMU that is installed
	$(BIN)/pytest tests/interop -m 'interop or matrix'

postcopy: $(STAMP) qemu ## postcopy and its recovery over every QEMU: matrices, cuts, bad peers, as tables
	$(BIN)/pytest tests/interop/test_*postcopy*.py tests/interop/test_recovery_in.py tests/interop/test_escrow.py \
	  tests/fault/test_*postcopy*.py -m 'interop or fault or matrix'

fault: $(STAMP) qemu ## cancel, kill, stall, corrupt
	$(BIN)/pytest tests/fault

faults: $(STAMP) qemu ## bad channels, files, disks and certificates: what is said, and what comes after
	$(BIN)/pytest tests/fault/test_multifd.py tests/fault/test_files.py tests/fault/test_failing_disk.py \
		tests/interop/test_tls.py -k 'not move and not keys' -m 'matrix or not matrix'

features: $(STAMP) qemu ## RAM by feature, QEMU release and direction, as a table
	$(BIN)/pytest tests/interop/test_feature_matrix.py -m matrix

fuzz: $(STAMP) ## random and mutated input for decoders, files and the monitor, with counts; FUZZ_TIMES=50 for more
	FUZZ_TIMES=$(FUZZ_TIMES) $(BIN)/pytest tests/fuzz --hypothesis-profile=explore --hypothesis-show-statistics --timeout 0

coverage: $(STAMP) ## branch coverage of the unit and conformance tests
	$(BIN)/coverage run -m pytest tests/unit tests/conformance
	$(BIN)/coverage report

BENCHMARKS := migrations monitor multifd growth xbzrle convergence files opening dirty snapshot postcopy workload_postcopy cpr

bench: ## all benchmarks beside QEMU, one after the other; alone: bench-NAME, as bench-multifd, with BENCH="--reps 9"
	for name in $(BENCHMARKS); do $(MAKE) --no-print-directory bench-$$name || exit 1; done

bench-migrations: $(STAMP) qemu
	$(BIN)/python -m benchmarks $(BENCH)

# Cost by size of the guest; half zero, so that 8 GiB at three peers fit into 24 GiB.
bench-growth: $(STAMP) qemu
	$(BIN)/python -m benchmarks.multifd --memory 1024,2048,4096,8192 --cells "2:none:half zero" --reps 1 $(BENCH)

bench-%: $(STAMP) qemu
	$(BIN)/python -m benchmarks.$* $(BENCH)

schemas: $(STAMP) ## write schemas/ anew from the models
	$(BIN)/python -m migrationd.qmp.schema --write

dev: $(STAMP) ## the virtual environment with everything for development
	@echo "ready: . $(BIN)/activate"

$(STAMP): pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "migrationd needs Python 3.11 or later; say which with PYTHON3=..." >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# $(call need,PROGRAM,DEBIAN PACKAGE,WHAT IS SKIPPED WITHOUT IT)
define need
	@if ! command -v $(1) >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $(2)" \
			&& apt-get update -qq \
			&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null; \
		else \
			echo "$(1) is not installed (Debian: apt-get install $(2)): $(3)" >&2; \
		fi; \
	fi
endef

qemu:
	$(call need,qemu-system-x86_64,qemu-system-x86,there is no demo and the tests with a real QEMU are skipped)

qemu-arm:
	$(call need,qemu-system-aarch64,qemu-system-arm,the tests with an aarch64 guest are skipped)

clean: ## remove what the targets made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
