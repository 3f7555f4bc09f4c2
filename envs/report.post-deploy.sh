#!/usr/bin/env bash
# The library itself, from the checkout that snakemake runs in; its dependencies are pinned in the environment.
set -euo pipefail
python -m pip install --no-deps --editable .
