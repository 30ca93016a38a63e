#!/usr/bin/env bash
# From nothing but Python 3.11 or 3.12: installs, then runs the tests that are not slow.
#   --all       the slow ones too
#   --plan      installs libtpu as well, and compiles for TPUs that are not there (the largest with --all)
#   --plan-gpu  installs jax's CUDA plugin as well (4 GB), and compiles for GPUs that are not there
#   --oracle    installs torch and transformers as well, and compares with them
# Other arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
marks="not slow and not oracle"
rest=()
for argument in "$@"; do
    case "$argument" in
        --all) marks=${marks/not slow and /} ;;
        --plan) "$PY" -c 'import libtpu' 2>/dev/null || "$PY" -m pip install --quiet --disable-pip-version-check --editable '.[plan]' ;;
        --plan-gpu) "$PY" -c 'import jax_cuda13_plugin' 2>/dev/null || "$PY" -m pip install --quiet --disable-pip-version-check --editable '.[cuda]' ;;
        --oracle)
            marks=${marks/not oracle/(oracle or not oracle)}
            "$PY" -c 'import torch, transformers' 2>/dev/null || "$PY" -m pip install --quiet --disable-pip-version-check --editable '.[oracle]'
            ;;
        *) rest+=("$argument") ;;
    esac
done
# A file's tests share what they have trained, so each goes to one process whole; -n 0 runs all in this one.
exec "$PY" -m pytest -n auto --maxprocesses 4 --dist loadfile -m "$marks" "${rest[@]}"
