# Every target sets up .venv by itself; nothing is needed before it but Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-cluster test-faults bench lint check coverage docs lock clean

run: $(VENV)/.ready
	launch/local.sh experiment=quickstart $(ARGS)

# In two processes: tests of several ranks wait for one another a third of their time.
test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# Slurm, two hosts and the image: as root on Debian it installs the packages that it needs; elsewhere it skips, with the
# reason.
test-cluster: $(VENV)/.ready
	$(BIN)/python -m pytest -m cluster $(ARGS)

# Forty faults, from a kill to a damaged checkpoint; a longer campaign:
# PYTHONPATH=tests .venv/bin/python -m faults --seed 1 --count 200
test-faults: $(VENV)/.ready
	$(BIN)/python -m pytest -m faults $(ARGS)

# Ours against what one would use otherwise; ARGS names single files of benchmarks/.
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py

# As `lint`, but nothing is changed: it fails where `lint` would change something.
check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# The share of lines and branches that the tests run, workers and ranks included. It takes longer than `test`.
coverage: $(VENV)/.ready
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

# The pages of docs/ as a site, in site/. Its tools have a lock of their own: neither the tests nor the image need them.
docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.lock
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

# torch comes first and pinned: left to a range, pip would take the newest CUDA build.
$(VENV)/.ready: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# After a change of pyproject.toml: write down what is installed now, but for the tools of the site.
lock: $(VENV)/.ready
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/' \
		| grep --invert-match --fixed-strings --line-regexp --file docs/requirements.lock > requirements.lock

clean:
	rm -rf $(VENV) runs
