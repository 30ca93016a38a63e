#!/usr/bin/env bash
# TPU VMs on Compute Engine, without Kubernetes:
#
#   tpu/vm.sh [--dry-run] create NAME ZONE MACHINE TOPOLOGY HOSTS [--spot]    such as create pm us-east5-a ct5p-hightpu-4t 4x4x4 16 --spot
#   tpu/vm.sh [--dry-run] setup NAME ZONE            on every host: this folder, Python 3.11, the locked packages, libtpu; again: updates
#   tpu/vm.sh [--dry-run] run NAME ZONE GENERATION COMMAND...    on every host, under tpu/supervise.sh, until done
#   tpu/vm.sh [--dry-run] stop NAME ZONE             SIGTERM to every host: they save, and end with 75
#   tpu/vm.sh [--dry-run] delete NAME ZONE
#
# A slice is a managed instance group of v5p, v6e or TPU7x machines with a workload policy of the topology
# (docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice).
#
# The older path, for slices of the Cloud TPU API (v4, v5e; gcloud compute tpus), is marked --older:
#   tpu/vm.sh [--dry-run] --older create NAME ZONE TYPE RUNTIME [--spot]      such as create pm us-west4-a v5litepod-16 v2-alpha-tpuv5-lite
# and the same setup, run, stop and delete, by `tpu-vm ssh --worker=all`. A spot slice that was preempted must be deleted and created anew.
set -euo pipefail
dry='' older=''
while [[ "${1:-}" == --dry-run || "${1:-}" == --older ]]; do
    [ "$1" = --dry-run ] && dry=1 || older=1
    shift
done
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
do_it() { # the command, or with --dry-run its text
    if [ -n "$dry" ]; then
        printf '%q ' "$@" && echo
    else
        "$@"
    fi
}
hosts() { # names of the slice's machines
    if [ -n "$dry" ]; then
        echo "$name-HOST"
    else
        gcloud compute instance-groups managed list-instances "$name" --zone "$zone" --format 'value(instance.basename())'
    fi
}
need_hosts() { # sets all, the names of the hosts; fails where there are none
    if ! all=$(hosts) || [ -z "$all" ]; then
        echo "$name has no hosts in $zone: is it created, and this the right zone and project?" >&2
        return 1
    fi
}
on_all() { # a shell command on every host, side by side; fails when one does
    local host all pids=() failed=0
    if [ -n "$older" ]; then
        do_it gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
        return
    fi
    need_hosts || return
    for host in $all; do
        do_it gcloud compute ssh "$host" --zone "$zone" --command "$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
    return "$failed"
}
copy_to_all() { # one file into the home folder of every host; fails when one copy does
    local host all
    if [ -n "$older" ]; then
        do_it gcloud compute tpus tpu-vm scp "$1" "$name:${1##*/}" --zone "$zone" --worker=all
        return
    fi
    need_hosts || return
    for host in $all; do
        do_it gcloud compute scp "$1" "$host:${1##*/}" --zone "$zone" || return
    done
}

[ $# -ge 3 ] || usage
verb=$1 name=$2 zone=$3
shift 3
spot=()
case "$verb$older" in
    create)
        [ $# -ge 3 ] || usage
        [ "${4:-}" = --spot ] && spot=(--provisioning-model=SPOT --instance-termination-action=STOP)
        do_it gcloud compute resource-policies create workload-policy "$name" --region "${zone%-*}" --type=HIGH_THROUGHPUT \
            --accelerator-topology="$2"
        do_it gcloud compute instance-templates create "$name" --machine-type="$1" --maintenance-policy=TERMINATE \
            --image-family=ubuntu-accelerator-2204-amd64-tpu --image-project=ubuntu-os-accelerator-images \
            --scopes=cloud-platform "${spot[@]}"
        do_it gcloud compute instance-groups managed create "$name" --zone "$zone" --template="$name" --size="$3" \
            --workload-policy="$name" --default-action-on-vm-failure=do-nothing
        ;;
    create1)
        [ $# -ge 2 ] || usage
        [ "${3:-}" = --spot ] && spot=(--spot)
        do_it gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" --accelerator-type="$1" \
            --runtime-version="$2" "${spot[@]}"
        ;;
    setup*)
        folder=$(mktemp -d)
        trap 'rm -r "$folder"' EXIT
        # ./data is the folder of data sets, and not hhjax/data
        do_it tar --exclude=./.git --exclude=./runs --exclude=./data --exclude='./.venv*' --exclude=__pycache__ \
            -czf "$folder/hhjax.tgz" -C "$here" .
        copy_to_all "$folder/hhjax.tgz"
        # Ubuntu 22.04, which the images have, brings Python 3.10, and 24.04 brings 3.12 without its venv.
        on_all "mkdir -p hhjax && tar -xzf hhjax.tgz -C hhjax && cd hhjax &&
            { python3.11 -c 'import ensurepip' 2>/dev/null || python3.12 -c 'import ensurepip' 2>/dev/null ||
            { sudo apt-get update && sudo apt-get install --yes python3.11-venv || sudo apt-get install --yes python3.12-venv; }; } &&
            bash -ec 'source scripts/env.sh; \$PY -m pip install --quiet --editable .[plan]'"
        ;;
    run*)
        [ $# -ge 2 ] || usage
        on_all "cd hhjax && PATH=\$(echo \$PWD/.venv-py3*/bin):\$PATH HHJAX_CLUSTER=1 tpu/supervise.sh -- tpu/env.sh $(printf '%q ' "$@")"
        ;;
    stop*) on_all "pkill -TERM -x supervise.sh" ;;
    delete)
        do_it gcloud compute instance-groups managed delete "$name" --zone "$zone" --quiet
        do_it gcloud compute instance-templates delete "$name" --quiet
        do_it gcloud compute resource-policies delete "$name" --region "${zone%-*}" --quiet
        ;;
    delete1) do_it gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet ;;
    *) usage ;;
esac
