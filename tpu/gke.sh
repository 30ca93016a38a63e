#!/usr/bin/env bash
# One command as a JobSet on GKE, and the Kueue queue that JobSets wait in:
#
#   tpu/gke.sh [--dry-run] queue --topology v5p:4x4x4 --slices 2
#   tpu/gke.sh [--dry-run] run --topology v5p:4x4x4 --image IMAGE --bucket BUCKET -- hhjax run experiments/pm_sizes.py --out /runs
#
# A sweep needs neither `run` nor this script: hhjax sweep FILE --backend gke. The flags are those of `python -m hhjax.jobset`.
set -euo pipefail
dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
manifest=$("${PYTHON:-python3}" -m hhjax.jobset "$@")
if [ -n "$dry" ]; then
    echo "# kubectl apply -f -"
    echo "$manifest"
else
    kubectl apply -f - <<<"$manifest"
fi
