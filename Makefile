# Each target does everything on a fresh clone: it makes the virtual environment, installs what it needs and runs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all soak lint clean

demo: $(VENV)/installed
	$(RUN) -m phi3lora demo

# What guards a change: about 7 minutes on 2 cores after installation.
test: $(VENV)/installed-for-tests lint
	$(PYTEST) -m "not slow"

# The rest. LIMIT_S=60 skips the tests that have not begun after 60 seconds.
test-slow: $(VENV)/installed-for-tests
	$(PYTEST) -m slow -rs $(if $(LIMIT_S),--limit-s $(LIMIT_S))

test-all: $(VENV)/installed-for-tests lint
	$(PYTEST)

# Minutes on 2 cores: every kill point and power cut of what is written, signals, then bad inputs to every reader.
soak: $(VENV)/installed-for-tests
	$(RUN) tests/soak/kill_points.py --random 150
	$(RUN) tests/soak/power_cuts.py
	$(RUN) tests/soak/signals.py
	$(RUN) tests/soak/bad_inputs.py --count 10000

lint: $(VENV)/installed-for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[plot]"
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
