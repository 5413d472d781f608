#!/usr/bin/env bash
# Compares the command line, and the library's adapter files, with the real PEFT and transformers, live.
#
#   ci/interop.sh [CASE...]
#
# Without arguments, all cases run. The reference is installed by python.sh. Needs python3 (3.11 or later) and cargo.
#   INTEROP_PYTHON        a python that has the packages of interop/requirements.txt: nothing is installed
#   TRAINABLE_TOKENS_BIN  the program to check: it is not built
#   ADAPTERS_BIN          the example `adapters` of crates/format: it is not built
set -euo pipefail
shopt -s inherit_errexit

cd "$(dirname "$0")/.."

target_directory() {
    local metadata
    metadata=$(cargo metadata --format-version 1 --no-deps)
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])' <<< "$metadata"
}

# A process group of its own, to end as a whole.
set -m
bash ci/python.sh > /dev/null &
installing=$!
set +m
trap 'kill -- "-$installing" 2> /dev/null || true' EXIT

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

wait "$installing"
trap - EXIT
python=$(bash ci/python.sh)

HF_HUB_OFFLINE=1 PYTHONPYCACHEPREFIX=$PWD/target/interop-pycache "$python" ci/interop/check.py "$program" "$adapters" "$@"
