#!/usr/bin/env bash
# One command on a cluster that xpk made (github.com/AI-Hypercomputer/xpk; flags of 1.16.0):
#
#   tpu/xpk.sh [--dry-run] --cluster C --workload NAME --tpu-type v5p-128 --docker-image IMAGE [more xpk flags] -- hhjax run FILE --out /runs
#
# xpk restarts a workload only after exit codes 42 and 127 to 255 unless told otherwise: 75 is a preemption, 1 a crash or a hang.
# 2 and 65, which a restart would repeat, end it. Give --storage for the bucket that is to be mounted at /runs.
set -euo pipefail
dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
flags=() generation=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --tpu-type) generation=${2%%-*} ;;
        --tpu-type=*) generation=${1#*=} generation=${generation%%-*} ;;
    esac
    flags+=("$1")
    shift
done
if [ $# -lt 2 ] || [ -z "$generation" ]; then
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
fi
shift
[ "$generation" = v5litepod ] && generation=v5e
run=(xpk workload create "${flags[@]}" --max-restarts=20 "--restart-on-exit-codes=1,75" --termination-grace-period-seconds=120
    --command "tpu/env.sh $generation $(printf '%q ' "$@")")
if [ -n "$dry" ]; then
    printf '%q ' "${run[@]}" && echo
    exit 0
fi
exec "${run[@]}"
