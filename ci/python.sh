#!/usr/bin/env bash
# A python that has the packages of interop/requirements.txt: real PEFT, transformers and torch. Prints its path.
#
#   python=$(ci/python.sh)
#
# They are installed once, into target/interop-venv; that is large, for torch brings its CUDA libraries along, though nothing
# here uses them. Needs python3 (3.11 or later).
#   INTEROP_PYTHON  a python that has the packages: nothing is installed
set -euo pipefail
shopt -s inherit_errexit

cd "$(dirname "$0")/.."

venv=$PWD/target/interop-venv
requirements=ci/interop/requirements.txt

fail() {
    echo "python.sh: $*" >&2
    exit 1
}

# Debian and its kin keep what venv needs in a package of its own.
ensure_venv_module() {
    python3 -c 'import ensurepip, venv' 2> /dev/null && return
    local package
    package=$(python3 -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    [[ $EUID -eq 0 ]] && command -v apt-get > /dev/null \
        || fail "python3 cannot make virtual environments: install $package (or set INTEROP_PYTHON)"
    echo "installing $package" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } > /dev/null \
        || fail "python3 cannot make virtual environments, and apt-get cannot install $package"
    python3 -c 'import ensurepip, venv' || fail "python3 cannot make virtual environments, even with $package"
}

# The environment is made whole or not at all: the stamp comes last.
install() {
    command -v python3 > /dev/null || fail "python3 is missing"
    local stamp
    stamp=$({ cat "$requirements" && python3 -c 'import sys; print(sys.version, sys.executable)'; } | sha256sum)
    [[ -f $venv/stamp && $(< "$venv/stamp") == "$stamp" ]] && return
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$(python3 --version) is older than 3.11"
    ensure_venv_module
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements" >&2 \
        || fail "cannot install the packages of $requirements"
    echo "$stamp" > "$venv/stamp"
}

if [[ -n ${INTEROP_PYTHON:-} ]]; then
    echo "$INTEROP_PYTHON"
else
    install
    echo "$venv/bin/python"
fi
