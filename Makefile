# Each target does everything on a fresh clone: makes the virtual environment, installs, runs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test soak lint clean

demo: $(VENV)/installed
	$(RUN) -m phi3lora demo

test: $(VENV)/installed lint
	$(RUN) -m pytest -n 2

# Minutes on 2 cores, half an hour at most: every kill point, then bad inputs to every reader.
soak: $(VENV)/installed
	$(RUN) tests/soak/kill_points.py --random 150
	$(RUN) tests/soak/bad_inputs.py --count 10000

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[plot,test]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
