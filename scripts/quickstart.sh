#!/usr/bin/env bash
# From nothing but Python 3.11 or 3.12: installs, then trains and evaluates a preference model on human comparisons.
# Arguments go to `hhjax run experiments/pm_hh.py`, e.g. --fast, --out DIR, --data-dir DIR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$HH" run experiments/pm_hh.py "$@"
