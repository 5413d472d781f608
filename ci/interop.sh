#!/usr/bin/env bash
# Compares the command line, and the library's adapter files, with the real PEFT and transformers, live.
#
#   ci/interop.sh [CASE...]
#
# Without arguments, all cases run. The reference is installed once, into target/interop-venv; it is large, for torch
# brings its CUDA libraries along, though nothing here uses them. Needs python3 (3.11 or later) and cargo.
#   INTEROP_PYTHON        a python that has the packages of interop/requirements.txt: nothing is installed
#   TRAINABLE_TOKENS_BIN  the program to check: it is not built
#   ADAPTERS_BIN          the example `adapters` of crates/format: it is not built
set -euo pipefail
shopt -s inherit_errexit

cd "$(dirname "$0")/.."

venv=$PWD/target/interop-venv
requirements=ci/interop/requirements.txt

fail() {
    echo "interop.sh: $*" >&2
    exit 1
}

# Debian and its kin keep what venv needs in a package of its own.
ensure_venv_module() {
    python3 -c 'import ensurepip, venv' 2> /dev/null && return
    local package
    package=$(python3 -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    [[ $EUID -eq 0 ]] && command -v apt-get > /dev/null \
        || fail "python3 cannot make virtual environments: install $package (or set INTEROP_PYTHON)"
    echo "installing $package"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } > /dev/null \
        || fail "python3 cannot make virtual environments, and apt-get cannot install $package"
    python3 -c 'import ensurepip, venv' || fail "python3 cannot make virtual environments, even with $package"
}

# The environment is made whole or not at all: the stamp comes last.
install_reference() {
    command -v python3 > /dev/null || fail "python3 is missing"
    local stamp
    stamp=$({ cat "$requirements" && python3 -c 'import sys; print(sys.version, sys.executable)'; } | sha256sum)
    [[ -f $venv/stamp && $(< "$venv/stamp") == "$stamp" ]] && return
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$(python3 --version) is older than 3.11"
    ensure_venv_module
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements" \
        || fail "cannot install the packages of $requirements"
    echo "$stamp" > "$venv/stamp"
}

target_directory() {
    local metadata
    metadata=$(cargo metadata --format-version 1 --no-deps)
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])' <<< "$metadata"
}

python=${INTEROP_PYTHON:-}
installing=
if [[ -z $python ]]; then
    python=$venv/bin/python
    set -m # a process group of its own, to end as a whole
    install_reference &
    installing=$!
    set +m
    trap 'kill -- "-$installing" 2> /dev/null || true' EXIT
fi

# Building and installing wait for different things, so they run side by side.
program=${TRAINABLE_TOKENS_BIN:-}
if [[ -z $program ]]; then
    cargo build --quiet -p trainable-tokens-cli
    program=$(target_directory)/debug/trainable-tokens
fi
adapters=${ADAPTERS_BIN:-}
if [[ -z $adapters ]]; then
    cargo build --quiet -p trainable-tokens-format --example adapters
    adapters=$(target_directory)/debug/examples/adapters
fi

if [[ -n $installing ]]; then
    wait "$installing"
    trap - EXIT
fi

HF_HUB_OFFLINE=1 PYTHONPYCACHEPREFIX=$PWD/target/interop-pycache "$python" ci/interop/check.py "$program" "$adapters" "$@"
