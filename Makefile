# Every target builds .venv on first use; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two processes; the tests of one file stay together and share what they set up. tests/conftest.py orders the files.
TWO    := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check bench docs clean
demo: $(VENV)/.installed
	$(BIN)/adalora demo

test: check
	$(BIN)/python -m pytest $(TWO) -m "slow and not gpu and not hub"

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@# The types beside the tests; either's failure is the target's.
	$(BIN)/mypy & types=$$!; trap 'kill $$types 2>/dev/null' INT TERM; \
	$(BIN)/python -m pytest $(TWO) -m "not slow and not gpu and not hub"; tests=$$?; \
	wait $$types || { echo "mypy failed, see above" >&2; exit 1; }; exit $$tests

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_readme.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
