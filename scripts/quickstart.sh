#!/usr/bin/env bash
# From nothing but Python 3.11 or 3.12: installs, then runs the whole paper in the simulated clinic, in two processes, to one report.
# Arguments go to `hhjax run experiments/quickstart.py`, e.g. --fast, --out DIR, --seed N.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$HH" run experiments/quickstart.py --jobs 2 "$@"
