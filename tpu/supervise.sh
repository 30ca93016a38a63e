#!/usr/bin/env bash
# Runs a command again until it is done, as a supervisor of one host's process:
#
#   tpu/supervise.sh [--most N] [--pause S] [--dry-run] -- hhjax run experiments/pm_sizes.py --out runs
#
# What hhjax ended with says what to do:
#   0           done
#   2, 65       wrong configuration or data; a loss that is not finite: the same would happen again, so it stays down
#   75          told to stop, and saved: started again at once, unless this script was told to stop too
#   all others  a crash, a hang that the watchdog ended (1), a lost peer (134), kill -9 (137): started again after S seconds, then 2 S, 4 S, ...
#               up to 10 minutes, and at most N times in a row; a run that lasted an hour begins the count anew
# SIGTERM and SIGINT are passed on, and the command's own exit code is this script's.
set -u
most=5 pause=10 longest=600 lasting=3600 dry=

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
        --most | --pause)
            [[ "${2:-}" =~ ^[0-9]+$ ]] || usage
            declare "${1#--}=$2"
            shift 2
            ;;
        --dry-run) dry=1 && shift ;;
        --) shift && break ;;
        *) usage ;;
    esac
done
[ $# -gt 0 ] || usage
if [ -n "$dry" ]; then
    echo "would run, again after at most $most crashes in a row: $(printf '%q ' "$@")"
    exit 0
fi

child="" stopped="" failures=0 rest=$pause
trap 'stopped=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT
say() { echo "supervise: $*" >&2; }

while true; do
    began=$SECONDS
    "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the command
        wait "$child"
        code=$?
    done
    case "$code" in
        0) exit 0 ;;
        2) say "wrong configuration or data: not started again" && exit "$code" ;;
        65) say "the loss is not finite: not started again" && exit "$code" ;;
    esac
    [ -n "$stopped" ] && exit "$code"
    if [ "$code" = 75 ]; then
        say "preempted: started again"
        continue
    fi
    ((SECONDS - began >= lasting)) && failures=0 rest=$pause
    failures=$((failures + 1))
    if ((failures > most)); then
        say "ended with $code, $failures times in a row: given up"
        exit "$code"
    fi
    say "ended with $code: started again in $rest s ($failures of at most $most)"
    sleep "$rest"
    [ -n "$stopped" ] && exit "$code"
    rest=$((rest * 2 < longest ? rest * 2 : longest))
done
