# shellcheck shell=bash disable=SC2034
# Sourced by quickstart.sh and test.sh: finds Python 3.11 or 3.12, makes .venv-py3XX from the lock file, installs hhjax.
# Sets PY (the interpreter) and HH (the hhjax command). HHJAX_PYTHON picks an interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
    local candidate
    for candidate in ${HHJAX_PYTHON:-} python3.11 python3.12 python3 python; do
        case "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" in
            3.11 | 3.12) echo "$candidate"; return ;;
        esac
    done
    echo "hhjax needs Python 3.11 or 3.12 and found neither; install one, or set HHJAX_PYTHON to it" >&2
    exit 2
}

python=$(find_python) || return 2 # the exit above ends its subshell alone
tag=py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
venv=.venv-$tag
PY=$venv/bin/python
HH=$venv/bin/hhjax
if ! cmp -s "lock/$tag.txt" "$venv/lock.txt"; then
    echo "installing lock/$tag.txt into $venv"
    start=$SECONDS
    "$python" -m venv --clear "$venv"
    "$PY" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r "lock/$tag.txt"
    "$PY" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    cp "lock/$tag.txt" "$venv/lock.txt"
    echo "installed in $((SECONDS - start)) s"
fi
