#!/usr/bin/env bash
# Runs a command with the settings of a TPU generation:  tpu/env.sh [--dry-run] v4|v5e|v5p|v6e|tpu7x COMMAND...
#
# LIBTPU_INIT_ARGS gets the compiler's flags; what it holds already comes last, and so wins. libtpu 0.0.52 compiles with them
# (tests/test_tpu.py); what they gain was not measured. On v5e collectives are split into parts that run beside products; on later
# generations this libtpu refuses that. HHJAX_CACHE is where compiled programs are kept, for the restart after a preemption: put it on a bucket.
set -eu
dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
if [ $# -lt 2 ]; then
    sed -n '2s/^# //p' "$0" >&2
    exit 2
fi
generation=$1
shift
flags="--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
case "$generation" in
    v5e)
        fusion=--xla_tpu_enable_async_collective_fusion
        flags="$flags $fusion=true ${fusion}_fuse_all_gather=true ${fusion}_multiple_steps=true"
        flags="$flags --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
        ;;
    v4 | v5p) ;;
    v6e | tpu7x) flags="$flags --xla_tpu_scoped_vmem_limit_kib=98304" ;;
    *)
        echo "tpu/env.sh: unknown generation '$generation'; choose v4, v5e, v5p, v6e or tpu7x" >&2
        exit 2
        ;;
esac
export LIBTPU_INIT_ARGS="$flags ${LIBTPU_INIT_ARGS:-}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
export HHJAX_CACHE="${HHJAX_CACHE:-$HOME/.cache/hhjax}"
if [ -n "$dry" ]; then
    printf '%s=%q ' LIBTPU_INIT_ARGS "$LIBTPU_INIT_ARGS" JAX_PLATFORMS "$JAX_PLATFORMS" HHJAX_CACHE "$HHJAX_CACHE"
    printf '%q ' "$@" && echo
    exit 0
fi
exec "$@"
